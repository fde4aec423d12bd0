"""The registered models: published sizes, golden logits, any image size, and what timm's own suite does not ask."""
import copy

import pytest
import timm
import timm.optim
import torch
from golden_values import GOLDEN, golden_image, golden_state_dict, read_golden, released_keys, released_shapes
from timm.models import save_for_hf
from torch.utils.flop_counter import FlopCounterMode

import ls_vision  # noqa: F401, registers the models
from ls_vision.compat import arch_to_model_args
from ls_vision.models import LongShortCvT, LongShortViL

# parameters and GMAC: ViL-LS of the released models, CvT of the layout rebuilt from the paper
SIZES = {
    'vil_ls_medium': (39_799_423, 8.69),
    'vil_ls_base': (55_834_363, 13.34),
    'vil_ls_medium_384': (39_947_653, 28.64),
    'cvt_ls_13': (20.17e6, 4.94),
    'cvt_ls_17': (23.53e6, 9.76),
    'cvt_ls_21': (31.90e6, 7.86),
    'cvt_ls_21s': (30.74e6, 11.19),
    'cvt_ls_21_384': (31.90e6, 23.83),
    'cvt_ls_21_448': (31.90e6, 34.07),
    'cvt_13': (20.00e6, 6.64),
    'cvt_21': (31.62e6, 10.10),
}
ALL = ('vil_ls_tiny', 'vil_ls_small', 'vil_ls_tiny_linear', 'vil_ls_small_linear', 'vil_ls_medium_linear',
       'vil_ls_base_linear', 'vil_full_medium', *SIZES)
SMALL = {
    'vil_ls': ('vil_ls_tiny', dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=2, rank=4)),
    'vil_linear': ('vil_ls_tiny_linear', dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=2, rank=4)),
    'cvt_ls': ('cvt_ls_13', dict(embed_dims=(16, 32, 48), depths=(1, 1, 2), num_heads=(1, 2, 3))),
    'cvt_full': ('cvt_13', dict(embed_dims=(16, 32, 48), depths=(1, 1, 2), num_heads=(1, 2, 3))),
}


def small(kind, **kwargs):
    name, args = SMALL[kind]
    return timm.create_model(name, **{**args, 'num_classes': 10, **kwargs}).eval()


def randomize(model):
    """Position tables and norms away from their initial values, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_all_are_registered():
    assert set(timm.list_models(module=['vil_ls', 'cvt_ls'])) == set(ALL)


@pytest.mark.parametrize('name', SIZES)
def test_published_sizes(name):
    model = timm.create_model(name, device='meta').eval()
    params = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    expected_params, expected_gmac = SIZES[name]
    if isinstance(expected_params, int):
        assert params == expected_params
    assert abs(params / expected_params - 1) < 0.01
    assert abs(counter.get_total_flops() / 2e9 / expected_gmac - 1) < 0.01


def golden_model(prefix):
    meta, tensors = read_golden(GOLDEN / 'vil_ls.safetensors')
    meta = {key[len(prefix) + 1:]: value for key, value in meta.items() if key.startswith(prefix)}
    model = timm.create_model('vil_ls_medium', num_classes=int(meta['num_classes']), **arch_to_model_args(meta['arch']))
    state_dict = golden_state_dict(released_shapes(model), int(meta['salt']))
    model.load_state_dict({'net': {f'module.{key}': value for key, value in state_dict.items()}, 'epoch': 300})
    x = golden_image(meta['name'], (int(meta['batch']), 3, int(meta['img_size']), int(meta['img_size'])))
    return model.eval(), x, {key[len(prefix) + 1:]: value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'unfused'])
@pytest.mark.parametrize('prefix', ['medium', 'toy'])
def test_golden_logits(prefix, fused):
    model, x, golden = golden_model(prefix)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    with torch.no_grad():
        assert (model(x) - golden['logits']).abs().max() < 1e-4
        if prefix == 'toy':
            _, stages = model.forward_intermediates(x)
            stage3 = golden['stage3.mean'][:, 1:]  # global token first
            torch.testing.assert_close(stages[2].flatten(2).transpose(1, 2), stage3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name,released', [
    ('vil_ls_medium', 'medium224'), ('vil_ls_base', 'base224'), ('vil_ls_medium_384', 'medium384')])
def test_released_names_and_shapes(name, released):
    expected = {k: tuple(v) for k, v in released_keys(released).items() if not k.endswith('relative_position_index')}
    assert released_shapes(timm.create_model(name, device='meta')) == expected


@pytest.mark.parametrize('kind', SMALL)
def test_any_image_size(kind):
    model = small(kind)
    for size in ((224, 224), (64, 64), (130, 65), (40, 352), (4, 4)):
        with torch.no_grad():
            features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
            assert model(torch.randn(2, 3, *size)).shape == (2, 10)
        for feature, info in zip(features, model.feature_info, strict=True):
            # CvT's overlapping patches leave out a last, partial stride, ViL's side by side are padded
            sides = [-(-s // info['reduction']) for s in size]
            assert feature.shape[:2] == (2, info['num_chs'])
            assert all(0 <= side - actual <= 1 for side, actual in zip(sides, feature.shape[2:], strict=True))


def test_native_size_is_not_interpolated():
    model = randomize(small('vil_ls', img_size=(96, 128)))
    other = small('vil_ls', img_size=(128, 96))
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        tables = [m for m in model.modules() if hasattr(m, 'set_feat_size')]
        for module in tables:
            table = module.local_relative_position_bias_table
            H, W = module.feat_size
            bias = module.position_bias((H, W))[:, -H * W:, -H * W:]
            # the first query sees the first key at distance 0, the last at minus the grid
            assert torch.equal(bias[:, 0, 0], table[(H - 1) * (2 * W - 1) + W - 1])
            assert torch.equal(bias[:, 0, -1], table[0])
        assert tables and model(x).shape == (2, 10)
        assert other.stages[3].blocks[0].attn.feat_size == (4, 3)


@pytest.mark.parametrize('kind', SMALL)
def test_set_input_size_equals_passing_the_size(kind):
    model = randomize(small(kind))
    resized = copy.deepcopy(model).requires_grad_(False)
    resized.set_input_size(img_size=(160, 96))
    assert not any(p.requires_grad for p in resized.parameters())
    x = torch.randn(1, 3, 160, 96)
    with torch.no_grad():
        assert torch.equal(resized(x), model(x))
    created = small(kind, img_size=(160, 96))
    created.load_state_dict(resized.state_dict())
    with torch.no_grad():
        assert torch.equal(created(x), resized(x))
    again = copy.deepcopy(resized)
    again.set_input_size(img_size=(160, 96))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resized.parameters(), strict=True))


def test_set_window_size():
    model = randomize(small('vil_ls', window_size=7)).to(torch.bfloat16)
    model.set_input_size(window_size=(8, 4, 7, 7))
    assert [m.window_size for m in model.modules() if hasattr(m, 'set_window_size')] == [8, 4]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.isfinite(model.float()(torch.randn(1, 3, 64, 64))).all()


@pytest.mark.parametrize('kind', SMALL)
def test_hub_round_trip_of_a_resized_model(kind, tmp_path):
    model = randomize(small(kind))
    model.set_input_size(img_size=96, **({'window_size': 4} if kind != 'cvt_full' else {}))
    model.reset_classifier(7)
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))


@pytest.mark.parametrize('kind', SMALL)
def test_init_weights_after_to_empty(kind):
    model = small(kind, device='meta', dtype=torch.float64).to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float('nan') if tensor.is_floating_point() else -1)
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    assert torch.isfinite(model(torch.randn(2, 3, 64, 64, dtype=torch.float64))).all()


def test_initial_values():
    model = timm.create_model('vil_ls_tiny')
    for name, parameter in model.named_parameters():
        if 'norm' in name or 'dual_ln' in name:
            assert (parameter == (1 if name.endswith('weight') else 0)).all(), name
        elif 'patch_embed' not in name and name.endswith('.bias'):
            assert (parameter == 0).all(), name
        elif 'patch_embed' not in name and parameter.numel() > 100:
            assert 0.015 < parameter.std() < 0.025, name


@pytest.mark.parametrize('kind', SMALL)
def test_gradient_checkpointing_keeps_gradients(kind):
    model = small(kind).train()
    x = torch.randn(2, 3, 64, 96)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('kind', SMALL)
def test_feature_maps(kind):
    model = small(kind, features_only=True, out_indices=(0, -1), num_classes=None)
    low, high = model(torch.randn(2, 3, 96, 64))
    assert low.shape == (2, 16, 24, 16) and high.shape[1] == model.feature_info.channels()[-1]


def test_layer_decay_groups_follow_depth():
    model = timm.create_model('vil_ls_tiny', device='meta')
    optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=1., weight_decay=.1, layer_decay=.5)
    scales = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    named = dict(model.named_parameters())
    order = ['stages.0.patch_embed.proj.weight', 'stages.0.blocks.0.attn.qkv.weight',
             'stages.2.blocks.0.attn.qkv.weight', 'stages.2.blocks.8.mlp.fc1.weight', 'head.fc.weight']
    values = [scales[id(named[n])] for n in order]
    assert values == sorted(values) and len(set(values)) == len(values) and values[-1] == 1
    assert decay[id(named['stages.0.global_tokens'])] == 0
    assert decay[id(named['stages.0.blocks.0.attn.local_relative_position_bias_table'])] == 0


@pytest.mark.parametrize('kind', SMALL)
def test_compile_fullgraph(kind):
    model = small(kind)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize('kind', SMALL)
def test_export(kind):
    model = small(kind)
    x = torch.randn(2, 3, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize('kind', SMALL)
def test_trace_and_script_at_other_sizes(kind):
    model = small(kind)
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), check_trace=False)
    scripted = torch.jit.script(model)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x))
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize('cls,options,message', [
    (LongShortViL, dict(depths=(1, 1, 9)), r'depths has 3 entries \(1, 1, 9\), expected one for each of 4 stages'),
    (LongShortViL, dict(num_heads=(3, 3)), 'num_heads has 2 entries'),
    (LongShortCvT, dict(window_size=(8, 4)), 'window_size has 2 entries'),
    (LongShortViL, dict(attn_types='linear'), "attn_types is 'linear', expected one of 'long-short', 'full'"),
    (LongShortViL, dict(num_heads=5), 'dim 96 is not divisible by num_heads 5'),
    (LongShortViL, dict(rank=-1), 'rank is -1'),
    (LongShortViL, dict(window_size=0), 'needs 1 or more'),
    (LongShortViL, dict(window_size=3.5), 'window_size is 3.5, expected an integer'),
    (LongShortViL, dict(img_size=3), 'Image of 3 x 3 pixels is smaller than a patch; expected 4 x 4'),
    (LongShortViL, dict(img_size=(224,)), 'img_size is'),
])
def test_wrong_arguments(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options, device='meta')


@pytest.mark.parametrize('kind', SMALL)
def test_wrong_image(kind):
    model = small(kind)
    with pytest.raises(ValueError, match='Image of 3 x 64 pixels is smaller than a patch; expected 4 x 4'):
        model(torch.randn(1, 3, 3, 64))
    before = model.state_dict()
    with pytest.raises(ValueError, match='window_size'):
        model.set_input_size(img_size=128, window_size=-1)
    assert model.img_size == (224, 224) and before.keys() == model.state_dict().keys()
