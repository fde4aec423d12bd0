"""A batch without images gives results without images, and gradients of zero: operators, backends, layers, models."""
import itertools

import pytest
import timm
import torch

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.ops import long_short_attention
from ls_vision.ops.backends import BACKENDS
from ls_vision.ops.long_range import attend_globally, summarize

CPU_BACKENDS = [None, *(name for name in BACKENDS if name not in ('triton', 'flex'))]
TOY = dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), rank=2, num_classes=3)


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check_gradients(outputs, inputs):
    """First and second derivatives have the inputs' shapes; those of tensors without a batch are 0."""
    grads = torch.autograd.grad([out.sum() for out in outputs], inputs, create_graph=True)
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs, strict=True))
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in second)


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('with_additional, with_lse', list(itertools.product((True, False), repeat=2)))
def test_attention(backend, with_additional, with_lse):
    query, key, value, bias = leaves(*[(0, 6, 7, 2, 16)] * 3, (2, 9, 25))
    additional = leaves(*[(0, 4, 2, 16)] * 2) if with_additional else [None, None]
    out = long_short_attention(query, key, value, 3, *additional, bias, backend=backend, return_lse=with_lse)
    outputs = out if with_lse else [out]
    assert [tuple(o.shape) for o in outputs] == [(0, 6, 7, 2, 16), (0, 2, 6, 7)][:1 + with_lse]
    check_gradients(outputs, [x for x in (query, key, value, *additional, bias) if x is not None])


@torch.no_grad()
def test_flex_and_no_window():
    query, pair = torch.randn(0, 6, 7, 2, 16), torch.randn(0, 4, 2, 16)
    assert long_short_attention(query, query, query, 3, pair, pair, backend='flex').shape == query.shape
    assert long_short_attention(query, query, query, 0, pair, pair).shape == query.shape


@pytest.mark.parametrize('with_lse', [True, False])
def test_long_range(with_lse):
    scores, tokens, query, own = leaves((0, 2, 3, 42), (0, 42, 2, 2, 16), (0, 1, 2, 16), (0, 1, 2, 2, 16))
    sums, lse = summarize(scores, tokens, with_lse)
    assert sums.shape == (0, 2, 3, 2, 16)
    check_gradients([sums, *([lse] if with_lse else [])], [scores, tokens])
    out, lse = attend_globally(query, own, tokens, .25, with_lse)
    assert out.shape == (0, 1, 2, 16)
    check_gradients([out, *([lse] if with_lse else [])], [query, own, tokens])


LAYERS = [
    *(lambda kwargs=kwargs: LongShortAttention2d(16, 2, **{'window_size': 3, 'rank': 3, **kwargs}) for kwargs in (
        {}, dict(num_global_tokens=1), dict(num_global_tokens=1, global_attention='pre', attn_drop=.5),
        dict(rank=0), dict(window_size=0, rel_pos_bias=None), dict(conv_projection=True))),
    *(lambda kwargs=kwargs: FullAttention2d(16, 2, **kwargs) for kwargs in (
        {}, dict(num_global_tokens=1, feat_size=(6, 7)), dict(feat_size=(5, 4)), dict(conv_projection=True))),
]


@pytest.mark.parametrize('make', LAYERS)
@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('amp', [True, False])
def test_layers(make, fused, amp):
    layer = make()
    layer.fused_attn = fused
    x = torch.randn(0, layer.num_global_tokens + 42, 16, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        out = layer(x, (6, 7))
        layer.attention_maps(x, (6, 7))
        with torch.no_grad():
            assert layer.eval()(x, (6, 7)).shape == x.shape
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'resnet18'])
def test_model_as_timms(name):
    kwargs = TOY if name.startswith('vil') else dict(num_classes=3)
    model = timm.create_model(name, **kwargs)
    x = torch.randn(0, 3, 224, 224)
    out = model(x)
    assert out.shape == (0, 3)
    out.sum().backward()
    with torch.inference_mode():
        assert model.eval()(x).shape == (0, 3)
    if name.startswith('vil'):
        assert torch.jit.script(model)(x).shape == (0, 3)
        assert [f.shape[0] for f in model.forward_intermediates(x)[1]] == [0] * 4
