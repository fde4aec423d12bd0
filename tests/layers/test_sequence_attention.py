"""LongShortAttention1d: golden values, padding, any length, precision, compilation, wrong input."""
from types import SimpleNamespace

import pytest
import torch
from golden_values import SEQUENCE_GOLDEN, check_gradients, read_golden
from torch._dynamo.testing import CompileCounter

from ls_vision.compat import SequenceAttentionLS
from ls_vision.layers import LongShortAttention1d

pytestmark = pytest.mark.usefixtures('one_thread')


def released_config(meta):
    dim, heads = int(meta['dim']), int(meta['num_heads'])
    return SimpleNamespace(
        transformer_dim=dim, num_head=heads, head_dim=dim // heads, num_landmarks=int(meta['rank']),
        window_size=int(meta['window']), conv_kernel_size=int(meta['conv_kernel_size']), attention_dropout=0.,
        pooling_mode='CLS' if meta['cls'] == 'sequence' else 'MEAN', cls_token=False, max_seq_len=48, fp32_attn=False)


@pytest.mark.parametrize('path', sorted(SEQUENCE_GOLDEN.glob('bi_*')), ids=lambda p: p.stem)
def test_golden_values(path):
    meta, tensors = read_golden(path)
    module = SequenceAttentionLS(released_config(meta))
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith('param.')}
    assert set(parameters) == set(module.state_dict())
    module.load_state_dict(parameters)
    x = tensors['x'].requires_grad_()
    cls = tensors['cls'].requires_grad_() if meta['cls'] == 'argument' else None
    y = module(x, tensors['mask'].float(), cls)
    y.backward(tensors['grad_y'])

    assert (y - tensors['y']).abs().max() < 1e-5
    check_gradients(module, tensors, vanishing='dconv_fc.bias', unused=meta['unused'].split())
    inputs = [(x, tensors['grad_x'])] + ([] if cls is None else [(cls, tensors['grad_cls'])])
    for tensor, expected in inputs:
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def dense(module, x, padding, global_tokens):
    """The layer of one sequence from its parameters, over all pairs of tokens."""
    h, w = module.num_heads, module.window_size
    x = x[~padding]
    N = len(x)

    def split(t):
        return t.unflatten(-1, (h, -1)).transpose(0, 1)  # (h, tokens, d)

    q = split(module.W_q(x)) * module.scale
    k, v = (split(module.dual_ln_l(m(x))) for m in (module.W_k, module.W_v))
    extra_k, extra_v = [], []
    if global_tokens is not None:
        k_c, v_c = split(module.W_k(global_tokens)), split(module.W_v(global_tokens))
        extra_k.append(k_c), extra_v.append(v_c)
    if module.rank:
        p = module.dconv_fc(x).unflatten(-1, (h, -1)).permute(1, 2, 0).softmax(-1)
        extra_k.append(p @ k), extra_v.append(p @ v)
    keys, values, hidden = [], [], []
    if extra_k:
        for parts, target in ((extra_k, keys), (extra_v, values)):
            target.append(split(module.dual_ln_s(torch.cat(parts, 1).transpose(0, 1).flatten(1))))
        hidden.append(torch.zeros(N, keys[0].shape[1], dtype=torch.bool))
    if w or not module.rank:
        size, p = max(w, 1), max(w // 2, 1) if w else 0
        i, j = torch.arange(N)[:, None] // size * size, torch.arange(N)
        keys.append(k), values.append(v)
        hidden.append((j < i - p) | (j >= i + size + p))
    logits = (q @ torch.cat(keys, 1).transpose(1, 2)).masked_fill(torch.cat(hidden, 1), float('-inf'))
    out = logits.softmax(-1) @ torch.cat(values, 1)  # (h, N, d)
    out_global = None
    if global_tokens is not None:
        q_c = split(module.W_q(global_tokens)) * module.scale
        attn = (q_c @ torch.cat([k_c, out], 1).transpose(1, 2)).softmax(-1)
        out_global = module.W_o((attn @ torch.cat([v_c, out], 1)).transpose(0, 1).flatten(1))
    if module.conv is not None:
        out = out + module.conv(v[None])[0]
    return module.W_o(out.transpose(0, 1).flatten(1)), out_global


OPTIONS = {
    'both': {},
    'many_summaries': dict(window_size=1, rank=20),
    'window_only': dict(rank=0),
    'summaries_only': dict(window_size=0),
    'convolution': dict(conv_kernel_size=3),
    'itself': dict(window_size=0, rank=0),
}


@pytest.mark.parametrize('num_global', [0, 1, 3])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_matches_dense_formula_with_and_without_padding(options, num_global):
    module = LongShortAttention1d(24, 3, **{**dict(window_size=4, rank=5), **options}).double()
    if module.conv is not None:
        torch.nn.init.normal_(module.conv.weight)
    if module.window_size == module.rank == num_global == 0:
        return  # nothing to attend to, an error of which another test knows
    x = torch.randn(4, 23, 24, dtype=torch.float64, requires_grad=True)
    cls = torch.randn(4, num_global, 24, dtype=torch.float64, requires_grad=True) if num_global else None
    padding = torch.arange(23) >= torch.tensor([23, 14, 1, 0])[:, None]
    x.data[padding] = float('nan')
    if module.conv is not None:
        padding = padding[:1].expand(4, -1)  # beyond a shorter sequence the convolution goes on
        x.data[x.data.isnan()] = 1.
    result = module(x, padding if padding.any() else None, cls)
    y, y_global = result if num_global else (result, None)
    assert y.isfinite().all()
    total, expected_total = y[~padding].square().sum(), 0.
    for row in range(4):
        if padding[row].all():
            continue
        expected, expected_global = dense(module, x[row], padding[row], cls[row] if num_global else None)
        torch.testing.assert_close(y[row][~padding[row]], expected)
        if num_global:
            torch.testing.assert_close(y_global[row], expected_global)
        expected_total = expected_total + expected.square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(total, x)[0], torch.autograd.grad(expected_total, x)[0].nan_to_num(0.))
    if padding.any():
        assert torch.equal(y[padding], module.W_o.bias.expand_as(y[padding]))


def test_padding_beside_a_convolution_has_its_share_of_the_last_values():
    module = LongShortAttention1d(8, 2, window_size=2, rank=2, conv_kernel_size=3)
    torch.nn.init.ones_(module.conv.weight)
    x, padding = torch.randn(1, 6, 8), torch.tensor([[False, False, False, True, True, True]])
    y = module(x, padding)
    assert not torch.allclose(y[0, 3], module.W_o.bias) and torch.equal(y[0, 4:], module.W_o.bias.expand(2, -1))
    torch.testing.assert_close(y[:, :3], module(x[:, :3]))


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_rows_of_padding_alone_are_finite_forward_and_backward(options):
    module = LongShortAttention1d(16, 2, **{**dict(window_size=4, rank=3), **options})
    x, cls = torch.full((2, 9, 16), float('nan')), torch.randn(2, 2, 16, requires_grad=True)
    y, y_global = module(x.requires_grad_(), torch.ones(2, 9, dtype=torch.bool), cls)
    (y.sum() + y_global.sum()).backward()
    tensors = [y, y_global, x.grad, cls.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    assert all(t.isfinite().all() for t in tensors)


def test_every_parameter_is_used():
    for options in ({}, dict(conv_kernel_size=3)):
        module = LongShortAttention1d(16, 2, window_size=4, rank=3, **options)
        module(torch.randn(1, 9, 16)).mean().backward()
        assert not [name for name, p in module.named_parameters() if p.grad is None]


@pytest.mark.parametrize('shape', [(2, 0, 16), (0, 5, 16), (1, 1, 16)])
def test_few_tokens(shape):
    module = LongShortAttention1d(16, 2, window_size=4, rank=3)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.isfinite().all()


@pytest.mark.parametrize('dtype,tolerance', [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_half_precision(dtype, tolerance):
    module = LongShortAttention1d(32, 4, window_size=4, rank=8)
    x, padding = torch.randn(2, 40, 32), torch.arange(40) >= torch.tensor([40, 17])[:, None]
    expected = module(x, padding)
    with torch.autocast('cpu', dtype):
        assert (module(x, padding) - expected).abs().max() < tolerance
    y = module.to(dtype)(x.to(dtype).requires_grad_(), padding)
    y.sum().backward()
    assert y.dtype == dtype and (y - expected).abs().max() < tolerance
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_dropout_path_gives_the_same_without_dropping():
    module = LongShortAttention1d(16, 2, window_size=4, rank=3, attn_drop=1e-9).train()
    x, padding = torch.randn(2, 11, 16), torch.arange(11) >= torch.tensor([11, 5])[:, None]
    torch.testing.assert_close(module(x, padding), module.eval()(x, padding))


def test_compiles_once_for_all_lengths():
    module = LongShortAttention1d(16, 2, window_size=4, rank=3)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for N in (17, 24, 39):
        x = torch.randn(2, N, 16)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_adapters_and_hooks_see_their_linear_map():
    module = LongShortAttention1d(16, 2, window_size=4, rank=3)
    x = torch.randn(1, 9, 16)
    expected, seen = module(x), []
    module.W_k.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    torch.testing.assert_close(module(x), expected)
    assert seen == [(1, 9, 16)]


@pytest.mark.parametrize('arguments,message', [
    (dict(num_heads=3), 'dim 16 is not divisible by num_heads 3'),
    (dict(num_heads=2.), r'num_heads is 2\.0, expected a whole number of 1 or more'),
    (dict(dim=0), 'dim is 0, expected 1 or more'),
    (dict(window_size=-1), 'window_size is -1, expected 0 or more'),
    (dict(rank=-2), 'rank is -2, expected 0 or more'),
    (dict(conv_kernel_size=4), r'conv_kernel_size is 4, expected 0 \(no convolution\) or an odd number'),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongShortAttention1d(**{**dict(dim=16, num_heads=2), **arguments})


@pytest.mark.parametrize('arguments,message', [
    ((torch.zeros(2, 9, 8),), r'x has shape \[2, 9, 8\], expected \(batch, tokens, 16\)'),
    ((torch.zeros(9, 16),), r'x has shape \[9, 16\]'),
    ((torch.zeros(2, 9, 16), torch.zeros(2, 8, dtype=torch.bool)), r'mask has shape \[2, 8\], expected \[2, 9\]'),
    ((torch.zeros(2, 9, 16), torch.ones(2, 9)), r'dtype torch.float32, expected a bool tensor, True where .* PADDING'),
    ((torch.zeros(2, 9, 16), [[False] * 9] * 2), 'type list, expected a bool tensor'),
    ((torch.zeros(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool, device='meta')), 'mask is on meta, expected cpu'),
    ((torch.zeros(2, 9, 16), None, torch.zeros(3, 1, 16)), r'global_tokens has shape \[3, 1, 16\], expected \(2, '),
])
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongShortAttention1d(16, 2)(*arguments)


def test_nothing_to_attend_to():
    with pytest.raises(ValueError, match='window_size and rank are 0 and there are no global tokens'):
        LongShortAttention1d(16, 2, window_size=0, rank=0)(torch.zeros(1, 4, 16))
