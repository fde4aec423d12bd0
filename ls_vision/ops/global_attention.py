"""Attention of a few global tokens to themselves and to all local tokens.

An operator of its own since the local tokens lie in another tensor than the global ones' keys and values: to bring them
into one would copy each token twice, and keep the copies for the backward pass.

Shapes: B batch, N local tokens, g global queries, m own keys, h heads, d head width; L = m + N.
"""
from typing import List, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .chunks import image_chunks


def attend_globally(
        query: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
) -> Tensor:
    """softmax(scale * q [own k, k]^T) [own v, v], with logits and statistics in float32.

    Args:
        query: (B, g, h, d).
        own_keys, own_values: (B, m, h, d), any strides.
        keys, values: (B, N, h, d), any strides; may be the same tensor.
        scale: Factor on the products.

    Returns:
        (B, g, h, d).
    """
    return torch.ops.ls_vision.global_attention(query, own_keys, own_values, keys, values, scale)


@torch.library.custom_op('ls_vision::global_attention', mutates_args=())
def _attend(
        query: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
) -> Tensor:
    out = query.new_empty(query.shape)
    for i in _chunks(keys):
        q = _heads(query, i)
        p = _weights(q, [_heads(own_keys, i), _heads(keys, i)], scale)
        p_own, p_local = p.split([own_keys.shape[1], keys.shape[1]], dim=-1)
        _heads_view(out, i).copy_(p_own @ _heads(own_values, i) + p_local @ _heads(values, i))
    return out


@_attend.register_fake
def _(query, own_keys, own_values, keys, values, scale):
    return query.new_empty(query.shape)


@torch.library.custom_op('ls_vision::global_attention_backward', mutates_args=())
def _attend_backward(
        grad: Tensor,
        query: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, own keys and values, keys and values."""
    grad_q, *grads = (t.new_empty(t.shape) for t in (query, own_keys, own_values, keys, values))
    for i in _chunks(keys):
        q, do = _heads(query, i), _heads(grad, i)
        k, v = ([_heads(t, i) for t in pair] for pair in ((own_keys, keys), (own_values, values)))
        p = _weights(q, k, scale)
        dp = torch.cat([do @ x.transpose(-2, -1) for x in v], dim=-1)
        ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
        sizes = [own_keys.shape[1], keys.shape[1]]
        p, ds = p.split(sizes, dim=-1), ds.split(sizes, dim=-1)
        _heads_view(grad_q, i).copy_(ds[0] @ k[0] + ds[1] @ k[1])
        for part in range(2):
            _heads_view(grads[2 * part], i).copy_(ds[part].transpose(-2, -1) @ q)
            _heads_view(grads[2 * part + 1], i).copy_(p[part].transpose(-2, -1) @ do)
    return (grad_q, *grads)  # type: ignore[return-value]


@_attend_backward.register_fake
def _(grad, query, own_keys, own_values, keys, values, scale):
    return tuple(t.new_empty(t.shape) for t in (query, own_keys, own_values, keys, values))


def _chunks(keys: Tensor) -> List[slice]:
    """Parts of the batch; on the CPU small ones, for products of two batch dimensions copy the tokens."""
    return image_chunks(keys.shape[0], keys[0].numel()) if keys.is_cpu else [slice(None)]


def _heads_view(x: Tensor, images: slice) -> Tensor:
    """(B, tokens, h, d) -> (images, h, tokens, d)."""
    return x[images].transpose(1, 2)


def _heads(x: Tensor, images: slice) -> Tensor:
    """The same in the precision of the statistics."""
    x = _heads_view(x, images)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _weights(q: Tensor, keys: List[Tensor], scale: float) -> Tensor:
    """(images, h, g, d) queries and (images, h, tokens, d) keys -> (images, h, g, all tokens)."""
    return torch.cat([q @ k.transpose(-2, -1) for k in keys], dim=-1).mul_(scale).softmax(dim=-1)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor):
    return (*torch.ops.ls_vision.global_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.ls_vision.global_attention)
def _forward_flops(query, own_keys, own_values, keys, *args, **kwargs) -> int:
    B, g, h, d = query
    return 4 * B * g * (own_keys[1] + keys[1]) * h * d


@register_flop_formula(torch.ops.ls_vision.global_attention_backward)
def _backward_flops(grad, query, own_keys, own_values, keys, *args, **kwargs) -> int:
    return _forward_flops(query, own_keys, own_values, keys) * 5 // 2
