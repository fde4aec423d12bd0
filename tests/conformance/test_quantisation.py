"""Quantised linear layers: `torchao` int8 by tensor subclasses, `torch.ao` by modules put in place of linear ones.

Coverage is counted on the full models: a layer that a tool does not recognise stays in float32 without a word.
"""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from families import each_model, full, images, linears, small
from torch import nn

torch.backends.quantized.engine = 'x86' if 'x86' in torch.backends.quantized.supported_engines else 'qnnpack'
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


def torchao_config(kind):
    from torchao import quantization as ao
    return dict(
        weight_only=ao.Int8WeightOnlyConfig, dynamic=ao.Int8DynamicActivationInt8WeightConfig)[kind]()


def distance(out, expected):
    """Norm of the difference over the norm."""
    return float((out - expected).norm() / expected.norm())


def quantised_by_hand(model):
    """The model with weights rounded to 8 bits, a scale for each output channel."""
    model = copy.deepcopy(model)
    for module in linears(model).values():
        scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127.5
        module.weight = nn.Parameter((module.weight.detach() / scale).round().clamp(-128, 127) * scale)
    return model


@pytest.mark.item('int8 weight-only and dynamic, eager: every linear layer, near float and near weights rounded by hand',
                  'torchao')
@pytest.mark.parametrize('kind', ['weight_only', 'dynamic'])
@each_model()
def test_torchao(name, kind):
    from torchao.quantization import quantize_
    model, x = small(name), images(2)
    expected, rounded = model(x).detach(), quantised_by_hand(model)(x).detach()
    quantize_(model, torchao_config(kind))
    assert all(type(m.weight.data) is not torch.Tensor or type(m.weight) is not nn.Parameter
               for m in linears(model).values())
    results = []
    for mode in MODES:
        with mode():
            results.append(model(x).detach().clone())
    assert 0 < distance(results[0], expected) < .05
    assert distance(results[0], rounded) < (.005 if kind == 'weight_only' else .05)
    for out in results[1:]:  # the last bit of a float decides how an activation is rounded
        assert distance(out, results[0]) < (1e-5 if kind == 'weight_only' else .02)


@pytest.mark.slow
@pytest.mark.item('int8 weight-only and dynamic, compiled: as in eager mode', 'torchao')
@pytest.mark.parametrize('kind', ['weight_only', 'dynamic'])
@each_model()
def test_torchao_compiled(name, kind):
    from torchao.quantization import quantize_
    model, x = small(name), images(2)
    quantize_(model, torchao_config(kind))
    torch.compiler.reset()
    with torch.no_grad():
        out = torch.compile(model)(x)
        assert distance(out, model(x)) < (.005 if kind == 'weight_only' else .05)


@pytest.mark.slow
@pytest.mark.item('int8 quantisation-aware training: fake-quantised layers train', 'torchao')
@each_model()
def test_torchao_qat(name):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig
    model, x = small(name), images(2)
    expected, expected_in_training = model(x).detach(), copy.deepcopy(model).train()(x).detach()
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(model, QATConfig(config, step='prepare'))
    out = model.train()(x)
    assert distance(out.detach(), expected_in_training) < .1
    out.square().sum().backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in linears(model).values())
    quantize_(model.eval(), QATConfig(config, step='convert'))
    assert distance(model(x).detach(), expected) < .1


@pytest.mark.item('saved and loaded int8 weights give equal results', 'torchao')
@each_model()
def test_torchao_state_dict(name, tmp_path):
    from torchao.quantization import quantize_
    model, x = small(name), images(2)
    quantize_(model, torchao_config('weight_only'))
    torch.save(model.state_dict(), tmp_path / 'model.pt')
    loaded = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded.load_state_dict(torch.load(tmp_path / 'model.pt', weights_only=False), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0., atol=0.)


@pytest.mark.item('LoRA on layers quantised to int8: gradients of the adapters alone', 'torchao', 'peft')
@each_model()
def test_lora_on_int8(name):
    import peft
    from torchao.quantization import quantize_
    model, x = small(name), images(2)
    quantize_(model, torchao_config('weight_only'), filter_fn=lambda m, n: isinstance(m, nn.Linear) and 'head' not in n)
    before = model(x).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=['qkv', 'fc1', 'fc2']))
    torch.testing.assert_close(adapted.eval()(x).detach(), before, rtol=1e-4, atol=1e-4)
    adapted.train()(x).square().sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all('lora_' in n and g is not None for n, g in grads.items())
    assert all(g.abs().sum() > 0 for n, g in grads.items() if 'lora_B' in n)


def quantize_dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.item('`torch.ao.quantization.quantize_dynamic` takes every linear layer of the full model, near float')
@each_model()
def test_dynamic_coverage(name):
    model, x = full(name), images(1, 224)
    names = set(linears(model))
    with torch.no_grad():
        expected = model(x)
        quantised = quantize_dynamic(model)
        done = {n for n, m in quantised.named_modules() if type(m) is torch.ao.nn.quantized.dynamic.Linear}
        assert sorted(names - done) == []
        assert F.cosine_similarity(quantised(x), expected) > .95


@pytest.mark.item('dynamic quantisation computes in 8 bits: operators seen by the profiler, one for each linear layer')
@each_model()
def test_dynamic_layers_are_called(name):
    model, x = small(name), images(2)
    count, expected = len(linears(model)), model(x).detach()
    quantised = quantize_dynamic(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.profiler.profile() as profile:
            out = quantised(x)
        calls = sum(e.count for e in profile.key_averages() if e.key == 'quantized::linear_dynamic')
        assert calls == count
        assert distance(out.clone(), expected) < .1


@pytest.mark.item('half precision: `model.bfloat16()` and autocast near float32')
@each_model()
def test_bfloat16(name):
    model, x = small(name), images(2)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert distance(model(x).float(), expected) < .05
        assert distance(model.bfloat16()(x.bfloat16()).float(), expected) < .05


@pytest.mark.slow
@pytest.mark.item('weights in 8 bits by optimum-quanto: every linear map, frozen, as with these weights in float (CvT-LS: `exclude="*.scores.conv"`)', 'optimum-quanto')
@each_model()
def test_quanto(name):
    from optimum import quanto
    model, x = small(name), images(2)
    names, rounded = set(linears(model)), copy.deepcopy(model)
    # quanto makes a plain convolution of timm's StdConv2d, whose weights are standardised in each call
    quanto.quantize(model, weights=quanto.qint8, exclude='*.scores.conv')
    quanto.freeze(model)
    assert {n for n, m in model.named_modules() if isinstance(m, quanto.QLinear)} == names
    with torch.no_grad():
        for n, module in model.named_modules():  # convolutions too
            if isinstance(module, (quanto.QLinear, quanto.QConv2d)):
                rounded.get_submodule(n).weight.copy_(module.weight.dequantize())
        assert distance(model(x), rounded(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.item('static quantisation of an exported program (PT2E, x86 inductor quantiser): near float', 'torchao')
@each_model()
def test_pt2e(name):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )
    model, x = small(name), images(2)
    expected = model(x).detach()
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
        assert 0 < distance(converted(x), expected) < .2
    quantised = [n for n in converted.graph.nodes if 'dequantize' in str(n.target)]
    assert len(quantised) >= len(linears(model))
