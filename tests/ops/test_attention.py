"""The attention function against the dense reference, forward and gradients, over drawn shapes and all precisions."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ls_vision.ops import long_short_attention, reference_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value


def draw_inputs(B, H, W, h, d, w, M, bias, dtype=torch.float32, seed=0):
    """Query, key, value, additional keys and values, bias; all but the last two are views of larger tensors."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv = randn(B, 2 + H * W, 3, h, d)
    q, k, v = (qkv[:, 2:, i].reshape(B, H, W, h, d) for i in range(3))
    extra = (randn(B, M, h, d), randn(B, M, h, d)) if M else (None, None)
    side = w + 2 * max(w // 2, 1)
    return [t if t is None else t.detach().requires_grad_() for t in (
        q, k, v, *extra, randn(h, w * w, side * side) if bias else None)]


def compare(inputs, w, tolerance, **kwargs):
    q, k, v, extra_k, extra_v, bias = inputs
    scale = q.shape[-1] ** -0.5
    actual = long_short_attention(q, k, v, w, extra_k, extra_v, bias, **kwargs)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    leaves = [t for t in inputs if t is not None]
    grad = torch.randn_like(actual)
    actual_grads = torch.autograd.grad(actual, leaves, grad)
    exact = [t if t is None else t.detach().float().requires_grad_() for t in inputs]
    expected = reference_attention(*exact[:3], w, *exact[3:], scale)
    expected_grads = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.float())
    for a, e in zip((actual, *actual_grads), (expected, *expected_grads), strict=True):
        assert (a.float() - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3), H=st.integers(1, 17), W=st.integers(1, 17), h=st.integers(1, 3),
    d=st.sampled_from([4, 8, 16]), w=st.sampled_from([1, 2, 3, 4, 5, 7, 8]), M=st.integers(0, 5), bias=st.booleans(),
    seed=st.integers(0, 99))
def test_matches_reference(B, H, W, h, d, w, M, bias, seed):
    compare(draw_inputs(B, H, W, h, d, w, M, bias, seed=seed), w, TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('w,M,bias', [(7, 9, True), (8, 9, True), (2, 4, False), (4, 16, False), (3, 0, True)])
def test_precisions(w, M, bias, dtype):
    compare(draw_inputs(2, 15, 12, 3, 16, w, M, bias, dtype), w, TOLERANCE[dtype])


def test_without_window():
    q, k, v, extra_k, extra_v, _ = draw_inputs(2, 5, 6, 2, 8, 1, 4, False)
    out = long_short_attention(q, k, v, 0, extra_k, extra_v)
    torch.testing.assert_close(out, reference_attention(q, k, v, 0, extra_k, extra_v, scale=8 ** -0.5))


@pytest.mark.parametrize('change,message', [
    (dict(key=torch.zeros(1, 4, 5, 2, 8)), 'must have that of the query'),
    (dict(query=torch.zeros(4, 4, 2, 8)), 'expected \\(batch, height, width, heads, head_dim\\)'),
    (dict(window_size=-1), 'window_size is -1'),
    (dict(window_size=0), 'nothing to attend to'),
    (dict(additional_keys=torch.zeros(1, 3, 2, 8)), 'given together'),
    (dict(additional_keys=torch.zeros(1, 3, 2, 4), additional_values=torch.zeros(1, 3, 2, 4)), 'head_dim 8'),
    (dict(bias=torch.zeros(2, 4, 4)), r'expected \(heads, queries, keys\) = \[2, 4, 16\]'),
])
def test_wrong_arguments(change, message):
    x = torch.zeros(1, 4, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        long_short_attention(**{**dict(query=x, key=x, value=x, window_size=2), **change})
