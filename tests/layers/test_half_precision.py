"""Half precision: finite at large activations and logits, statistics in float32, nothing large kept in float32."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.ops import calls, long_short_attention

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('backend', ['reference', 'composite', 'blocked'])
@pytest.mark.parametrize('size', [(1e2, 1.), (1e3, 1e-2)], ids=['logits of 1e4', 'activations of 1e3'])
@pytest.mark.parametrize('feat_size,w', [((8, 3), 7), ((9, 16), 8), ((1, 5), 2)])
def test_operator_stays_finite(dtype, backend, size, feat_size, w):
    """Queries and keys so large that products overflow 16 bits, on grids whose edges mask most of a window."""
    size, grad_size = size
    generator = torch.Generator().manual_seed(0)
    shape = (2, *feat_size, 2, 16)
    q, k, v = ((size * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(3))
    more = [(size * torch.randn(2, 3, 2, 16, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]
    bias = torch.randn(2, w * w, (w + 2 * max(w // 2, 1)) ** 2, generator=generator).requires_grad_()
    out = long_short_attention(q, k, v, w, *more, bias, backend=backend, scale=1.)
    assert out.dtype == dtype and out.isfinite().all()
    grads = torch.autograd.grad(out, [q, k, v, *more, bias], grad_size * torch.randn_like(out))
    assert all(g.isfinite().all() for g in grads)
    # what attends to one key alone, as here nearly all do, returns a value
    assert out.abs().max() <= v.abs().max().maximum(more[1].abs().max())


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'unfused'])
@pytest.mark.parametrize('make', [
    lambda: LongShortAttention2d(32, 2, window_size=7, rank=4, num_global_tokens=1),
    lambda: LongShortAttention2d(32, 2, window_size=2, rank=4, rel_pos_bias=None, global_attention='pre'),
    lambda: FullAttention2d(32, 2, feat_size=(9, 5), num_global_tokens=1),
], ids=['long-short', 'two-token windows', 'full'])
def test_layers_stay_finite(dtype, fused, make):
    """Activations of 1e3 and weights that make logits of 1e4 of them."""
    torch.manual_seed(0)
    layer = make()
    layer.fused_attn = fused
    with torch.no_grad():
        queries_of = layer.qkv.weight[:32]
        queries_of.normal_(std=.2)
    layer.to(dtype)
    x = (1e3 * torch.randn(2, layer.num_global_tokens + 45, 32)).to(dtype).requires_grad_()
    out = layer(x, (9, 5))
    assert out.dtype == dtype and out.isfinite().all()
    (out * 1e-3).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_statistics_are_those_of_float32():
    """A softmax over 3,000 keys, whose sum in 16 bits would stop growing on the way."""
    torch.manual_seed(0)
    for dtype in HALVES:
        q = torch.zeros(1, 4, 4, 1, 16, dtype=dtype)
        values = torch.rand(1, 3000, 1, 16).to(dtype)
        out = long_short_attention(q, q, q, 2, torch.zeros_like(values), values, backend='blocked')
        expected = values.float().sum(1) / (3000 + 9)  # corner: 9 window keys, zero
        torch.testing.assert_close(out[:, 0, 0].float(), expected, rtol=1e-2, atol=0)


class LargeFloats(TorchDispatchMode):
    """The operators that return float32 tensors of so many elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.numel() >= self.numel:
                self.found.add(str(func))
        return out


@pytest.mark.parametrize('options', [
    dict(num_global_tokens=1, global_attention='post'),
    dict(num_global_tokens=2, global_attention='pre', window_size=8),
    dict(rel_pos_bias=None, window_size=2),
], ids=str)
def test_nothing_large_is_float32_under_autocast(options, monkeypatch):
    # the operators of training, not the plain operations that other people's dispatch modes get
    monkeypatch.setattr(calls, '_has_foreign_mode', lambda: False)
    layer = LongShortAttention2d(32, 2, rank=4, **options)
    x = torch.randn(2, layer.num_global_tokens + 32 * 32, 32, requires_grad=True)
    kept = []
    with (
            torch.autocast('cpu', torch.bfloat16), LargeFloats(x.numel() // 2) as large,
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)):
        out = layer(x, (32, 32))
    assert out.dtype == torch.bfloat16
    assert not large.found
    assert not [t.shape for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel() // 2]
    # input once, queries, keys and values, their norm's input, summaries' and outputs' copies: no more than these
    distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(distinct.values()) < 12 * x.numel() * 2


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_tiny_linear', 'cvt_ls_13'])
@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_models_under_autocast(name, dtype):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    images = 1e3 * torch.randn(1, 3, 65, 97)
    with torch.autocast('cpu', dtype):
        out = model(images)
    assert out.isfinite().all()
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
