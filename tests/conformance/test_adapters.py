"""Adapters of `peft` on the layers that people name: LoRA, DoRA, IA3, OFT.

A layer that is called through something else than its own `forward` looks adapted and isn't, so that every adapted layer
is checked: it gets gradients, and its adapter changes the result.
"""
import pytest
import torch
from families import each_model, images, linears, small
from torch import nn

LORA_TARGETS = {
    'qkv': ['qkv'],
    'proj': ['proj'],
    'fc1 and fc2': ['fc1', 'fc2'],
    'all-linear': 'all-linear',
}


def adapt(model, config_class, **kwargs):
    import peft
    return peft.get_peft_model(model, getattr(peft, config_class)(**kwargs))


def train(model, training=True):
    """The model in training, but for what batch norm remembers."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def outputs(model, x):
    """In training, and in evaluation with and without gradients."""
    out = []
    for training, context in ((True, torch.enable_grad), (False, torch.enable_grad), (False, torch.no_grad),
                              (False, torch.inference_mode)):
        train(model, training)
        with context():
            out.append(model(x).detach().clone())
    return out


def disturb(model):
    """Adapters that do something: LoRA's start at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * .1)


def check_adapters(model, base, x, atol=1e-4):
    """All modes agree, only adapters have gradients and all of them, and merged weights give the same."""
    before = base(x).detach()
    for out in outputs(model, x):
        torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-5)
    disturb(model)
    after = outputs(model, x)
    assert (after[0] - before).abs().max() > 2e-3
    for out in after[1:]:
        torch.testing.assert_close(out, after[0], rtol=1e-4, atol=atol)

    train(model)(x).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and not (
        p.grad is not None and p.grad.abs().sum() > 0)]
    assert without == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    merged = model.eval().merge_and_unload()
    assert not [n for n, _ in merged.named_parameters() if 'lora' in n or 'ia3' in n or 'oft' in n]
    for out in outputs(merged, x):
        torch.testing.assert_close(out, after[0], rtol=1e-3, atol=10 * atol)


@pytest.mark.item('LoRA on `qkv`, `proj`, the MLP or all linear layers: as the base at first, gradients, merging', 'peft')
@pytest.mark.parametrize('targets', LORA_TARGETS)
@each_model()
def test_lora(name, targets):
    model = adapt(small(name), 'LoraConfig', r=2, target_modules=LORA_TARGETS[targets])
    adapted = [n for n, m in model.named_modules() if hasattr(m, 'lora_A') and hasattr(m, 'base_layer')]
    expected = [n for n in linears(small(name)) if targets == 'all-linear' or n.split('.')[-1] in LORA_TARGETS[targets]]
    assert adapted and all(type(model.get_submodule(n).base_layer) is nn.Linear or targets == 'proj' for n in adapted)
    assert {n for n in expected if n.startswith(('stages', 'layers'))} <= {n.removeprefix('base_model.model.')
                                                                         for n in adapted}
    check_adapters(model, small(name), images(2))


@pytest.mark.item('LoRA on `qkv` reaches every attention layer', 'peft')
@each_model()
def test_lora_reaches_every_attention(name):
    model = adapt(small(name), 'LoraConfig', r=2, target_modules=['qkv'])
    layers = [n for n, _ in model.named_modules() if n.endswith('.attn')]
    assert layers
    for layer in layers:
        assert [n for n, _ in model.named_modules() if n.startswith(f'{layer}.') and n.endswith('lora_A')], layer


@pytest.mark.item('LoRA on the dynamic projection (`to_dynamic_projection`, Swin: `reduction`)', 'peft')
@each_model()
def test_lora_on_dynamic_projection(name):
    target = 'reduction' if 'swin' in name else 'to_dynamic_projection'
    check_adapters(adapt(small(name), 'LoraConfig', r=2, target_modules=[target]), small(name), images(2))


@pytest.mark.item('DoRA, rank-stabilised LoRA, LoRA with bias, PiSSA', 'peft')
@pytest.mark.parametrize('kwargs', [
    dict(use_dora=True), dict(use_rslora=True), dict(bias='lora_only'), dict(init_lora_weights='pissa')],
    ids=lambda kwargs: next(iter(kwargs)))
@each_model()
def test_lora_variants(name, kwargs):
    model = adapt(small(name), 'LoraConfig', r=2, target_modules=['qkv', 'fc1', 'fc2'], **kwargs)
    check_adapters(model, small(name), images(2), atol=1e-3)


@pytest.mark.item('IA3, LoHa, LoKr, OFT, BOFT, VeRA', 'peft')
@pytest.mark.parametrize('config', [
    ('IA3Config', dict(feedforward_modules=['fc2'])),
    ('LoHaConfig', dict(r=2)),
    ('LoKrConfig', dict(r=2)),
    ('OFTConfig', dict(oft_block_size=4, r=0)),
    ('VeraConfig', dict(r=2)),
], ids=lambda config: config[0])
@each_model()
def test_other_adapters(name, config):
    kind, kwargs = config
    targets = ['fc2'] if kind == 'VeraConfig' else ['qkv', 'fc2']
    check_adapters(adapt(small(name), kind, target_modules=targets, **kwargs), small(name), images(2), atol=1e-3)


@pytest.mark.item('LoRA with a trained classifier: saved, loaded into a new model, equal', 'peft')
@each_model()
def test_save_and_load(name, tmp_path):
    import peft
    model = adapt(small(name), 'LoraConfig', r=2, target_modules=['qkv', 'fc1'], modules_to_save=['head'])
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small(name), tmp_path)
    for out, expected in zip(outputs(loaded, images(2)), outputs(model, images(2))):
        torch.testing.assert_close(out, expected)


@pytest.mark.item('LoRA trains: the loss of a batch falls, the base stays as it was', 'peft')
@each_model()
def test_lora_trains(name):
    base = small(name)
    model = adapt(base, 'LoraConfig', r=4, target_modules='all-linear')
    kept = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, targets, losses = images(4), torch.tensor([1, 2, 3, 4]), []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < .7 * losses[0]
    for n, value in kept.items():
        torch.testing.assert_close(model.get_parameter(n).detach(), value.detach(), rtol=0., atol=0.)


@pytest.mark.item('per-sample gradients of LoRA adapters by `vmap(grad(...))`: those of a loop', 'peft')
@each_model()
def test_per_sample_gradients_of_adapters(name):
    from test_functorch import TARGETS, loop_of_grads, sample_loss
    model = adapt(small(name), 'LoraConfig', r=2, target_modules=['qkv', 'fc1'])
    disturb(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: t.detach() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
            if n not in trained}
    grads = torch.func.vmap(torch.func.grad(sample_loss(model, rest)), in_dims=(None, 0, 0))(
        trained, images(3), TARGETS)
    expected = loop_of_grads(model, images(3), TARGETS, trained)
    for n in trained:
        torch.testing.assert_close(grads[n], expected[n], rtol=1e-3, atol=1e-4)
