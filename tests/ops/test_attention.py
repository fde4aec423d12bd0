"""Every backend against the dense reference: forward, log-sum-exp and gradients, over drawn shapes and precisions."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ls_vision.ops import Window, chunks, long_short_attention
from ls_vision.ops.backends import BACKENDS
from ls_vision.ops.backends.reference import window_pairs
from ls_vision.ops.window import make_window, num_keys, num_queries

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest
HERE = [
    name for name, backend in BACKENDS.items()
    if backend.why_not(torch.empty(1, 4, 4, 1, 16), make_window(2), True, True) is None]


def draw_inputs(B, H, W, h, d, w, M, bias, dtype=torch.float32, seed=0):
    """Query, key, value, additional keys and values, bias; all but the last two are views of larger tensors."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    qkv = randn(B, 2 + H * W, 3, h, d)
    q, k, v = (qkv[:, 2:, i].reshape(B, H, W, h, d) for i in range(3))
    extra = (randn(B, M, h, d), randn(B, M, h, d)) if M else (None, None)
    window = make_window(w)
    return [t if t is None else t.detach().requires_grad_() for t in (
        q, k, v, *extra, randn(h, num_queries(window), num_keys(window)) if bias else None)]


def compare(inputs, w, tolerance, **kwargs):
    """Output, log-sum-exp and gradients through both, as fractions of the largest value of the reference."""
    q, k, v, extra_k, extra_v, bias = inputs
    actual, lse = long_short_attention(q, k, v, w, extra_k, extra_v, bias, return_lse=True, **kwargs)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    grad, grad_lse = torch.randn_like(actual), torch.randn_like(lse)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = [t if t is None else t.detach().to(statistics).requires_grad_() for t in inputs]
    expected, expected_lse = long_short_attention(
        *exact[:3], w, *exact[3:], backend='reference', return_lse=True)
    assert lse.shape == expected_lse.shape and lse.dtype == statistics
    for grads in ((grad, None), (grad, grad_lse)):
        pairs = list(zip(
            gradients((actual, lse), inputs, grads), gradients((expected, expected_lse), exact, grads), strict=True))
        for a, e in ((actual, expected), (lse, expected_lse), *pairs):
            assert (a.to(statistics) - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


def gradients(outputs, inputs, grads):
    used = [(out, g.to(out.dtype)) for out, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad(
        [out for out, _ in used], [t for t in inputs if t is not None], [g for _, g in used], retain_graph=True)


@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(HERE), B=st.integers(1, 3), H=st.integers(1, 17), W=st.integers(1, 17),
    h=st.integers(1, 3), d=st.sampled_from([4, 8, 16]), w=st.sampled_from([1, 2, 3, 4, 5, 7, 8]), M=st.integers(0, 5),
    bias=st.booleans(), seed=st.integers(0, 99))
def test_matches_reference(backend, B, H, W, h, d, w, M, bias, seed):
    compare(draw_inputs(B, H, W, h, d, w, M, bias, seed=seed), w, TOLERANCE[torch.float32], backend=backend)


@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from(HERE), H=st.integers(1, 13), W=st.integers(1, 13), rows=st.integers(1, 6),
    cols=st.integers(1, 6), row_margin=st.integers(0, 5), col_margin=st.integers(0, 5), M=st.integers(0, 3),
    bias=st.booleans())
def test_rectangular_windows(backend, H, W, rows, cols, row_margin, col_margin, M, bias):
    window = Window(rows, cols, row_margin, col_margin)
    compare(draw_inputs(2, H, W, 2, 4, window, M, bias), window, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('w,M,bias', [(4, 3, True), ((2, 6), 0, False), (Window(1, 4, 0, 2), 20, False), (0, 3, False)])
@pytest.mark.parametrize('backend', HERE)
def test_key_padding_mask(backend, w, M, bias, dtype):
    """Padding is seen by nobody, its own output is 0, and a row of nothing else is finite."""
    window = make_window(w)
    inputs = draw_inputs(3, 1 if window.rows == 1 else 5, 9, 2, 8, w, M, bias, dtype)
    mask = torch.rand(inputs[0].shape[:3]) < 0.4
    mask[1], mask[2] = True, False
    actual = long_short_attention(*inputs[:3], w, *inputs[3:], backend=backend, key_padding_mask=mask)
    assert (actual[mask] == 0).all()
    statistics = torch.promote_types(dtype, torch.float32)
    exact = [None if t is None else t.detach().to(statistics).requires_grad_() for t in inputs]
    expected = padded_formula(*exact, window, mask)
    grad = torch.randn_like(expected)
    used = [t for t in inputs if t is not None]
    pairs = zip(
        torch.autograd.grad(actual, used, grad.to(dtype), allow_unused=True),
        torch.autograd.grad(expected, [t for t in exact if t is not None], grad, allow_unused=True), strict=True)
    for a, e in ((actual, expected), *pairs):
        e = torch.zeros(()) if e is None else e
        a = torch.zeros(()) if a is None else a
        assert a.isfinite().all()
        assert (a.to(statistics) - e).abs().max() <= TOLERANCE[dtype] * e.abs().max().clamp(min=1)


def padded_formula(q, k, v, extra_k, extra_v, bias, window, mask):
    """The softmax of each token over the keys that it sees, over all pairs."""
    feat_size = q.shape[1:3]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (B, h, N, d)
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if window.rows:
        seen, number = window_pairs(feat_size, window, q.device)
        logits = logits + (0. if bias is None else bias.flatten(1)[:, number])
    else:
        seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    logits = logits.masked_fill(~(seen & ~mask.flatten(1)[:, None, None]), float('-inf'))
    if extra_k is not None:
        extra_k, extra_v = (t.transpose(1, 2) for t in (extra_k, extra_v))
        logits = torch.cat([logits, q @ extra_k.transpose(2, 3) * q.shape[-1] ** -0.5], -1)
        v = torch.cat([v, extra_v], 2)
    token = ~mask.flatten(1)[:, None, :, None]
    weights = torch.where(token, logits, 0.).softmax(-1)
    out = torch.where(token, weights @ v, 0.)
    return out.transpose(1, 2).unflatten(1, feat_size)


@settings(max_examples=25, deadline=None)
@given(
    W=st.integers(1, 150), size=st.integers(1, 9), margin=st.integers(0, 12), M=st.integers(0, 20),
    padded=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
    elements=st.sampled_from([400, 2 ** 19]))
def test_one_row(W, size, margin, M, padded, dtype, elements):
    """Sequences, whose windows the blocked backend computes in a way of its own, some or all at a time."""
    window = Window(1, size, 0, margin)
    inputs = draw_inputs(3, 1, W, 2, 4, window, M, False, dtype)
    mask = torch.rand(3, 1, W) < 0.3 if padded else torch.zeros(3, 1, W, dtype=torch.bool)
    expected = padded_formula(*inputs, window, mask)
    grad, used = torch.randn_like(expected), [t for t in inputs if t is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, 'CHUNK_ELEMENTS', elements)
        actual = long_short_attention(
            *inputs[:3], window, *inputs[3:], backend='blocked', key_padding_mask=mask if padded else None)
        grads = torch.autograd.grad(actual, used, grad)
    pairs = zip(grads, torch.autograd.grad(expected, used, grad), strict=True)
    for a, e in ((actual, expected), *pairs):
        assert (a - e).abs().max() <= TOLERANCE[dtype] * e.abs().max().clamp(min=1)


@pytest.mark.parametrize('mask,message', [
    (torch.zeros(2, 3, 3), 'dtype torch.float32, expected a bool tensor, True where a token is PADDING'),
    (torch.zeros(2, 9, dtype=torch.bool), r'shape \[2, 9\], expected \[2, 3, 3\]'),
])
def test_wrong_key_padding_mask(mask, message):
    q = torch.zeros(2, 3, 3, 1, 4)
    with pytest.raises(ValueError, match=message):
        long_short_attention(q, q, q, 2, key_padding_mask=mask)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('w,M,bias', [(7, 9, True), (8, 9, True), (2, 4, False), (4, 16, False), ((2, 6), 0, True)])
@pytest.mark.parametrize('backend', HERE)
def test_precisions(backend, w, M, bias, dtype):
    compare(draw_inputs(2, 15, 12, 3, 16, w, M, bias, dtype), w, TOLERANCE[dtype], backend=backend)


@pytest.mark.parametrize('w,M,bias', [(7, 9, True), (2, 4, False), ((2, 6), 0, True)])
def test_flex_without_gradients(w, M, bias):
    inputs = [None if t is None else t.detach() for t in draw_inputs(2, 15, 12, 2, 16, w, M, bias)]
    with torch.no_grad():
        actual = long_short_attention(*inputs[:3], w, *inputs[3:], backend='flex')
        expected = long_short_attention(*inputs[:3], w, *inputs[3:], backend='reference')
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', HERE)
@pytest.mark.parametrize('shape', [(0, 4, 5), (2, 1, 1)])
def test_empty_batch_and_single_token(backend, shape):
    inputs = draw_inputs(*shape, 2, 8, 4, 3, True)
    out = long_short_attention(*inputs[:3], 4, *inputs[3:], backend=backend)
    assert out.shape == inputs[0].shape
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, inputs, strict=True))


def test_without_window():
    q, k, v, extra_k, extra_v, _ = draw_inputs(2, 5, 6, 2, 8, 1, 4, False)
    out = long_short_attention(q, k, v, 0, extra_k, extra_v)
    expected = long_short_attention(q, k, v, 0, extra_k, extra_v, backend='reference')
    torch.testing.assert_close(out, expected)


def test_dropout_of_weights():
    """With values of 1 an output is the sum of the weights left, 1 on average and scaled by 1 / (1 - p)."""
    q, k, _, *_ = draw_inputs(2, 20, 20, 2, 8, 4, 0, False)
    out = long_short_attention(q, k, torch.ones_like(q), 4, dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 0.01 and out.std() > 0.02


@pytest.mark.parametrize('change,message', [
    (dict(key=torch.zeros(1, 4, 5, 2, 8)), 'must have that of the query'),
    (dict(query=torch.zeros(4, 4, 2, 8)), 'expected \\(batch, height, width, heads, head_dim\\)'),
    (dict(window_size=-1), 'window_size is -1'),
    (dict(window_size=(4, 0)), r'window_size is \(4, 0\)'),
    (dict(window_size=Window(2, 2, -1, 0)), 'margins of 0 or more'),
    (dict(window_size=0), 'nothing to attend to'),
    (dict(additional_keys=torch.zeros(1, 3, 2, 8)), 'given together'),
    (dict(additional_keys=torch.zeros(1, 3, 2, 4), additional_values=torch.zeros(1, 3, 2, 4)), 'head_dim 8'),
    (dict(bias=torch.zeros(2, 4, 4)), r'expected \(heads, queries, keys\) = \[2, 4, 16\]'),
    (dict(dropout_p=0.1, return_lse=True), 'dropout_p is 0.1, expected 0 with return_lse'),
])
def test_wrong_arguments(change, message):
    x = torch.zeros(1, 4, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        long_short_attention(**{**dict(query=x, key=x, value=x, window_size=2), **change})
