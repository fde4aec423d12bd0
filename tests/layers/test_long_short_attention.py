"""LongShortAttention2d: golden values, every grid and option, precision, scripting, wrong input."""
import pytest
import torch
from golden_values import ATTENTION_FILES, read_golden

from ls_vision.compat import AttentionLS
from ls_vision.layers import LongShortAttention2d
from ls_vision.ops import long_short_attention


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'unfused'])
@pytest.mark.parametrize('path', ATTENTION_FILES, ids=lambda p: p.stem)
def test_golden_values(path, fused):
    meta, tensors = read_golden(path)
    module = AttentionLS(
        int(meta['dim']), int(meta['num_heads']), qkv_bias=meta.get('qkv_bias') != 'False', rpe=meta['rpe'] == 'True',
        nglo=int(meta['nglo']), dp_rank=int(meta['rank']), w=int(meta['window']),
        global_attention=meta.get('global_mode', 'post'))
    module.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith('param.')})
    module.fused_attn = fused
    x = tensors['x'].requires_grad_()
    y = module(x, int(meta['grid']), int(meta['grid']))
    y.backward(tensors['grad_y'])

    assert (y - tensors['y']).abs().max() < 1e-5
    assert relative(x.grad, tensors['grad_x']) < 1e-4
    for name, parameter in module.named_parameters():
        expected = tensors[f'grad.{name}']
        if name == 'to_dynamic_projection.bias':
            # a shift of all scores cancels in the softmax over tokens: zero but for rounding
            assert max(parameter.grad.abs().max(), expected.abs().max()) < 1e-4
        else:
            assert relative(parameter.grad, expected) < 1e-4, name


def plain(module, x, feat_size):
    """The layer written out over all pairs of tokens, from its parameters."""
    (H, W), g, h, C = feat_size, module.num_global_tokens, module.num_heads, module.dim
    B, N = x.shape[0], feat_size[0] * feat_size[1]
    grid = x.reshape(B, H, W, C).permute(0, 3, 1, 2) if module.qkv is None else None
    if grid is None:
        q, k, v = module.qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = module.query(grid), module.key(grid), module.value(grid)
    k, v = module.dual_ln_full(k), module.dual_ln_full(v)

    def split(t):
        return t.reshape(B, -1, h, C // h)

    extra_k, extra_v = split(k[:, :g]), split(v[:, :g])
    if module.rank:
        scores = module.to_dynamic_projection(x[:, g:]) if grid is None else module.scores(grid)
        p = scores.reshape(B, N, h, module.rank).permute(0, 2, 3, 1).softmax(-1)
        long_k = torch.einsum('bhrn,bnhd->brhd', p, split(k[:, g:])).flatten(2)
        long_v = torch.einsum('bhrn,bnhd->brhd', p, split(v[:, g:])).flatten(2)
        extra_k = torch.cat([split(module.dual_ln_dp(long_k)), extra_k], 1)
        extra_v = torch.cat([split(module.dual_ln_dp(long_v)), extra_v], 1)
    grids = [t[:, g:].reshape(B, H, W, h, C // h) for t in (q, k, v)]
    out = long_short_attention(
        *grids, module.window_size, extra_k, extra_v, module.position_bias(), module.scale,
        backend='reference').reshape(B, N, C)
    if g:
        keys = torch.cat([k[:, :g], out], 1) if module.global_attention == 'post' else k
        values = torch.cat([v[:, :g], out], 1) if module.global_attention == 'post' else v
        attn = (torch.einsum('bghd,bnhd->bhgn', split(q[:, :g]), split(keys)) * module.scale).softmax(-1)
        out = torch.cat([torch.einsum('bhgn,bnhd->bghd', attn, split(values)).flatten(2), out], 1)
    return module.proj(out)


OPTIONS = {
    'released': {},
    'unique_bias': dict(rel_pos_bias='unique'),
    'no_bias': dict(rel_pos_bias=None),
    'window_only': dict(rank=0, num_global_tokens=0),
    'window_and_global': dict(rank=0, num_global_tokens=2),
    'long_range_only': dict(window_size=0, rel_pos_bias=None),
    'no_dual_ln': dict(dual_ln=False),
    'pre': dict(global_attention='pre', num_global_tokens=3),
    'window_1': dict(window_size=1),
    'window_2': dict(window_size=2, rank=4),
    'wide': dict(window_size=(2, 5)),
    'wide_unique': dict(window_size=(3, 1), rel_pos_bias='unique'),
    'conv': dict(conv_projection=True, num_global_tokens=0),
}


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'unfused'])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_options_match_plain_formula(options, fused):
    module = LongShortAttention2d(24, 3, **{**dict(window_size=4, rank=5, num_global_tokens=1), **options})
    module.fused_attn = fused
    for feat_size in ((8, 8), (5, 11), (3, 2)):
        x = torch.randn(2, module.num_global_tokens + feat_size[0] * feat_size[1], 24, requires_grad=True)
        actual = module.eval()(x, feat_size)
        expected = plain(module, x, feat_size)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(actual)
        torch.testing.assert_close(
            torch.autograd.grad(actual, x, weight)[0], torch.autograd.grad(expected, x, weight)[0],
            rtol=1e-4, atol=1e-5)


def test_every_parameter_is_used():
    for options in OPTIONS.values():
        module = LongShortAttention2d(24, 3, **{**dict(window_size=4, rank=5, num_global_tokens=1), **options})
        module(torch.randn(2, module.num_global_tokens + 64, 24), (8, 8)).mean().backward()
        assert not [name for name, p in module.named_parameters() if p.grad is None], options


def test_images_of_a_batch_do_not_mix():
    module = LongShortAttention2d(24, 3, num_global_tokens=1).eval()
    x = torch.randn(3, 1 + 9 * 13, 24)
    torch.testing.assert_close(module(x, (9, 13)), torch.cat([module(row[None], (9, 13)) for row in x]))


@pytest.mark.parametrize('dtype,tolerance', [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype, tolerance):
    module = LongShortAttention2d(32, 4, num_global_tokens=1).eval()
    x = torch.randn(2, 1 + 15 * 9, 32)
    expected = module(x, (15, 9))
    with torch.autocast('cpu', dtype=dtype):
        actual = module(x, (15, 9))
    assert actual.dtype == dtype
    assert relative(actual.float(), expected) < tolerance
    actual = module.to(dtype)(x.to(dtype), (15, 9))
    assert actual.dtype == dtype
    assert relative(actual.float(), expected) < tolerance
    assert torch.isfinite(module(100 * x.to(dtype), (15, 9))).all()


def test_scripting():
    for options in OPTIONS.values():
        module = LongShortAttention2d(24, 3, **{**dict(window_size=4, rank=5, num_global_tokens=1), **options}).eval()
        scripted = torch.jit.script(module)
        for feat_size in ((8, 8), (5, 11)):
            x = torch.randn(2, module.num_global_tokens + feat_size[0] * feat_size[1], 24)
            torch.testing.assert_close(scripted(x, feat_size), module(x, feat_size))


def test_dropout_of_weights_in_training_only():
    module = LongShortAttention2d(24, 3, attn_drop=0.5)
    x = torch.randn(1, 64, 24)
    assert not torch.equal(module(x, (8, 8)), module(x, (8, 8)))
    module.eval()
    assert torch.equal(module(x, (8, 8)), module(x, (8, 8)))


def test_attention_extract_finds_the_weights():
    from timm.utils import AttentionExtract
    module = torch.nn.ModuleDict(dict(attn=LongShortAttention2d(24, 3)))
    module.attn.fused_attn = False
    module.forward = lambda x: module['attn'](x, (8, 8))
    names = AttentionExtract(module, method='hook').names
    assert names == ['attn.attn_drop']


@pytest.mark.parametrize('options,message', [
    (dict(dim=25), 'dim 25 is not divisible by num_heads 3'),
    (dict(window_size=0), 'window_size is 0, a window with a position bias needs 1 or more'),
    (dict(window_size=-1), 'window_size is -1, expected 0 or more'),
    (dict(rank=-1), 'rank is -1, expected 0 or more'),
    (dict(rank=1.5), 'rank is 1.5, expected a whole number of 0 or more'),
    (dict(window_size='7'), r"window_size is '7', expected a whole number or a pair \(rows, columns\)"),
    (dict(window_size=(4,)), r'window_size is \(4,\), expected a whole number or a pair'),
    (dict(num_global_tokens=-2), 'num_global_tokens is -2'),
    (dict(rel_pos_bias='swin'), "rel_pos_bias is 'swin', expected one of 'released', 'unique', None"),
    (dict(global_attention='both'), "global_attention is 'both', expected one of 'post', 'pre'"),
    (dict(window_size=0, rel_pos_bias=None, rank=0), 'nothing to attend to'),
    (dict(conv_projection=True, num_global_tokens=1), 'convolutional projections allow only 0'),
])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LongShortAttention2d(**{**dict(dim=24, num_heads=3), **options})


def test_wrong_grid():
    module = LongShortAttention2d(24, 3, num_global_tokens=1)
    with pytest.raises(ValueError, match='Got 64 tokens, but a grid of 8 x 8 with 1 global tokens has 65'):
        module(torch.randn(1, 64, 24), (8, 8))


def test_rectangular_window_on_a_panorama():
    """Pixels beyond a window's rows or columns have no part in its outputs."""
    layer = LongShortAttention2d(16, 2, window_size=(4, 16), rank=0).eval()
    x = torch.randn(1, 8 * 64, 16, requires_grad=True)
    layer(x, (8, 64))[0, 0].sum().backward()
    seen = x.grad.abs().sum(-1).view(8, 64) > 0
    assert seen[:6, :24].all() and not seen[6:].any() and not seen[:, 24:].any()


@pytest.mark.parametrize('kind', ['released', 'unique'])
def test_rectangular_windows_resize_and_script(kind):
    layer = LongShortAttention2d(16, 2, window_size=(4, 6), rank=2, rel_pos_bias=kind).eval()
    x = torch.randn(1, 9 * 13, 16)
    torch.testing.assert_close(torch.jit.script(layer)(x, (9, 13)), layer(x, (9, 13)), rtol=1e-4, atol=1e-5)
    torch.nn.init.constant_(layer.local_relative_position_bias_table, 0.5)
    layer.set_window_size((6, 8))
    assert layer.window_size == (6, 8) and layer.position_bias().shape == (2, 48, 12 * 16)
    torch.testing.assert_close(layer.position_bias(), torch.full((2, 48, 192), 0.5))
    assert layer(x, (9, 13)).shape == x.shape
    square = LongShortAttention2d(16, 2, window_size=(6, 6), rel_pos_bias=kind)
    assert square.window_size == 6


def test_wrong_rectangular_windows():
    for wrong in ((0, 4), (-1, 4)):
        with pytest.raises(ValueError, match='window_size is'):
            LongShortAttention2d(16, 2, window_size=wrong)
