"""Long-short attention as a function of tensors.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys, w window size, p = max(w // 2, 1) key margin,
Q = w * w queries and K = (w + 2p)^2 keys of a window.
"""
import os
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import BACKENDS, backward, choose_backend, forward
from .geometry import num_windows
from .precision import to_autocast
from .reference import reference_attention
from .tiles import gather_tiles, merge_windows

BACKEND_ENV = 'LS_VISION_BACKEND'


def long_short_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor] = None,
        additional_values: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        scale: Optional[float] = None,
        dropout_p: float = 0.0,
        backend: Optional[str] = None,
) -> Tensor:
    """Attention of each token to the square around its window and to keys that every token sees, in one softmax.

    Equations 5 and 6 of the paper (arXiv 2107.02192) with the released implementation's windows: queries form
    non-overlapping w x w windows, a window's keys are the (w + 2p)^2 square centred on it, and the additional keys are
    the r dynamic projections of the image and its global tokens.

    Args:
        query, key, value: (B, H, W, h, d), any H and W.
        window_size: w; 0 leaves the additional keys alone.
        additional_keys, additional_values: (B, M, h, d) or None.
        bias: (h, Q, K) added to the scaled logits of a window's keys, or None.
        scale: Factor on query . key; d ** -0.5 by default.
        dropout_p: Probability with which an attention weight is dropped; gathers all tiles where it is not 0.
        backend: 'reference' (dense, slow), 'blocked' (portable) or 'triton' (CUDA); by default the environment
            variable LS_VISION_BACKEND, else 'triton' on GPUs that it runs on and 'blocked' elsewhere.

    Returns:
        (B, H, W, h, d), in the dtype of the query.

    Raises:
        ValueError: A shape or the window size does not fit, or the backend is unknown or can't run here.
    """
    check_attention_args(query, key, value, window_size, additional_keys, additional_values, bias)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not torch.jit.is_scripting():
        query, key, value = to_autocast(query), to_autocast(key), to_autocast(value)
        if additional_keys is not None and additional_values is not None:
            additional_keys, additional_values = to_autocast(additional_keys), to_autocast(additional_values)
        check_backend(backend)
        if _resolve(backend or '', query, window_size) == 'reference' and dropout_p == 0.:
            return reference_attention(
                query, key, value, window_size, additional_keys, additional_values, bias, scale)
    if window_size > 0 and dropout_p == 0.:
        return torch.ops.ls_vision.long_short_attention(
            query, key, value, window_size, additional_keys, additional_values, bias, scale,
            '' if backend is None else backend)[0]

    q, k, v, mask = gather_tiles(query, key, value, window_size, additional_keys, additional_values, bias)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if window_size == 0:
        return out.transpose(1, 2).reshape(query.shape)
    return merge_windows(out, (query.shape[1], query.shape[2]), window_size)


@torch.library.custom_op('ls_vision::long_short_attention', mutates_args=())
def _attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        backend: str,
) -> Tuple[Tensor, Tensor]:
    """The output, and what the backward pass of the backend wants to know besides (of no elements, if nothing)."""
    return forward(
        _resolve(backend, query, window_size), query, key, value, window_size, additional_keys, additional_values, bias,
        scale)


@_attention.register_fake
def _(query, key, value, window_size, additional_keys, additional_values, bias, scale, backend):
    B, H, W, h, _ = query.shape
    statistics = (B, h, H, W) if _resolve(backend, query, window_size) == 'triton' else (0,)
    return query.new_empty(query.shape), query.new_empty(statistics, dtype=torch.float32)


@torch.library.custom_op('ls_vision::long_short_attention_backward', mutates_args=())
def _attention_backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        backend: str,
        out: Tensor,
        statistics: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, additional keys and values, bias; of no elements for what is not there."""
    grads = backward(
        _resolve(backend, query, window_size), grad_out, query, key, value, window_size, additional_keys,
        additional_values, bias, scale, out, statistics)
    return tuple(query.new_empty(0) if g is None else g.contiguous() for g in grads)  # type: ignore[return-value]


@_attention_backward.register_fake
def _(grad_out, query, key, value, window_size, additional_keys, additional_values, bias, scale, backend, out,
      statistics):
    return tuple(
        query.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (query, key, value, additional_keys, additional_values, bias))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, window_size, additional_keys, additional_values, bias, scale, backend = inputs
    ctx.save_for_backward(query, key, value, additional_keys, additional_values, bias, *output)
    ctx.window_size, ctx.scale, ctx.backend = window_size, scale, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Optional[Tensor], grad_statistics: Optional[Tensor]):
    query, key, value, additional_keys, additional_values, bias, out, statistics = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 9
    grads = torch.ops.ls_vision.long_short_attention_backward(
        grad_out, query, key, value, ctx.window_size, additional_keys, additional_values, bias, ctx.scale, ctx.backend,
        out, statistics)
    present = (query, key, value, additional_keys, additional_values, bias)
    q, k, v, extra_k, extra_v, b = (None if x is None else g for x, g in zip(present, grads))
    return q, k, v, None, extra_k, extra_v, b, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _flops(query_shape, window_size: int, additional_shape) -> int:
    """Of one matrix product: 2 per multiply-add, for all windows and keys, also those over the grid's edge."""
    B, H, W, h, d = query_shape
    nH, nW = num_windows((H, W), window_size)
    keys = (window_size + 2 * max(window_size // 2, 1)) ** 2 + (0 if additional_shape is None else additional_shape[1])
    return 2 * B * nH * nW * window_size ** 2 * keys * h * d


@register_flop_formula(torch.ops.ls_vision.long_short_attention)
def _forward_flops(query, key, value, window_size, additional_keys, *args, **kwargs) -> int:
    return 2 * _flops(query, window_size, additional_keys)


@register_flop_formula(torch.ops.ls_vision.long_short_attention_backward)
def _backward_flops(grad_out, query, key, value, window_size, additional_keys, *args, **kwargs) -> int:
    return 5 * _flops(query, window_size, additional_keys)  # the logits once more, and two for each product


def check_backend(backend: Optional[str]) -> None:
    """Raises ValueError where the backend that argument or environment variable name does not exist."""
    for name, source in ((backend, 'backend'), (os.environ.get(BACKEND_ENV), BACKEND_ENV)):
        if name and name not in BACKENDS:
            raise ValueError(f'{source} is {name!r}, expected one of {", ".join(BACKENDS)}.')


def _resolve(backend: str, query: Tensor, window_size: int) -> str:
    return choose_backend(backend or os.environ.get(BACKEND_ENV, ''), query, window_size)


def check_attention_args(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
) -> None:
    """Raises ValueError with the offending value where the arguments of `long_short_attention` do not fit."""
    if query.dim() != 5:
        raise ValueError(f'query has shape {list(query.shape)}, expected (batch, height, width, heads, head_dim).')
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f'key has shape {list(key.shape)} and value {list(value.shape)}, both must have that of the query, '
            f'{list(query.shape)}.')
    if window_size < 0:
        raise ValueError(f'window_size is {window_size}, expected 0 (no window) or more.')
    if (additional_keys is None) != (additional_values is None):
        raise ValueError('additional_keys and additional_values must be given together.')
    if additional_keys is not None and additional_values is not None:
        if additional_keys.shape != additional_values.shape or additional_keys.dim() != 4:
            raise ValueError(
                f'additional_keys has shape {list(additional_keys.shape)} and additional_values '
                f'{list(additional_values.shape)}, expected (batch, keys, heads, head_dim) of both.')
        if additional_keys.shape[0] != query.shape[0] or additional_keys.shape[2:] != query.shape[3:]:
            raise ValueError(
                f'additional_keys has shape {list(additional_keys.shape)}, expected batch {query.shape[0]}, '
                f'{query.shape[3]} heads and head_dim {query.shape[4]}.')
    elif window_size == 0:
        raise ValueError('window_size is 0 and there are no additional keys: nothing to attend to.')
    if bias is not None:
        side = window_size + 2 * max(window_size // 2, 1)
        expected = [query.shape[3], window_size * window_size, side * side]
        if list(bias.shape) != expected:
            raise ValueError(f'bias has shape {list(bias.shape)}, expected (heads, queries, keys) = {expected}.')
