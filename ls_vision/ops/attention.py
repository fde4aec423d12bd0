"""Long-short attention as a function of tensors, and the operator behind it.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys; Q queries and K keys of a window. Keys and values
travel together, as a pair (..., 2, h, d).
"""
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import double_backward
from .backends import BACKENDS, resolve
from .backends.composite import composite_attention, merge_windows, tile_logits
from .calls import is_empty, is_followed
from .numerics import statistics_dtype, to_autocast, to_dtype
from .window import Window, make_window, num_keys, num_queries, num_windows


def long_short_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: Union[int, Tuple[int, int], Window],
        additional_keys: Optional[Tensor] = None,
        additional_values: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        scale: Optional[float] = None,
        dropout_p: float = 0.0,
        backend: Optional[str] = None,
        return_lse: bool = False,
        key_padding_mask: Optional[Tensor] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Attention of each token to the tokens around its window and to keys that every token sees, in one softmax.

    Equations 5 and 6 of the paper (arXiv 2107.02192) with the released implementation's windows: queries form
    non-overlapping windows, the keys of a window are the rectangle around it, larger by a margin on each side, and the
    additional keys are the r dynamic projections of the image and its global tokens.

    Args:
        query, key, value: (B, H, W, h, d), any H and W.
        window_size: w for a w x w window with a margin of max(w // 2, 1), (rows, columns) for a rectangular one, or a
            `Window` with margins of its own; 0 leaves the additional keys alone.
        additional_keys, additional_values: (B, M, h, d) or None.
        bias: (h, Q, K) added to the scaled logits of a window's keys, or None.
        scale: Factor on query . key; d ** -0.5 by default.
        dropout_p: Probability of dropping an attention weight; above 0, all tiles and weights are held.
        backend: 'reference' (dense, slow), 'composite' (plain operations on copied tiles), 'blocked' (portable and
            lean), 'flex' (FlexAttention) or 'triton' (CUDA). By default the environment variable LS_VISION_BACKEND,
            else 'triton' on GPUs that it runs on and 'blocked' elsewhere; 'composite' where an exporter, a tracer, a
            functorch transform or forward-mode AD follows the operations.
        return_lse: Also return the log-sum-exp of each query's logits.
        key_padding_mask: (B, H, W) bool, true where a token is PADDING, as in `torch.nn.MultiheadAttention`. Padding is
            no key of any window, and its own output is 0. None for none.

    Returns:
        (B, H, W, h, d) in the dtype of the query; with `return_lse` also (B, h, H, W) in float32 (double for doubles),
        of no meaning where a token is padding.

    Raises:
        ValueError: A shape or the window size does not fit, or the backend is unknown or can't run here.
    """
    window = make_window(window_size)
    check_attention_args(query, key, value, window, additional_keys, additional_values, bias)
    check_padding_mask(key_padding_mask, query, query.shape[:3])
    if dropout_p > 0. and return_lse:
        raise ValueError(f'dropout_p is {dropout_p}, expected 0 with return_lse.')
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, pair = to_autocast(query), torch.stack([to_autocast(key), to_autocast(value)], dim=3)
    additional = None
    if additional_keys is not None and additional_values is not None:
        additional = torch.stack([to_autocast(additional_keys), to_autocast(additional_values)], dim=2)
    if dropout_p > 0.:
        logits, values = tile_logits(query, pair, window, additional, bias, scale, key_padding_mask)
        weights = F.dropout(to_dtype(logits.softmax(dim=-1), values.dtype), dropout_p)
        out = merge_windows(torch.matmul(weights, values), (query.shape[1], query.shape[2]), window)
        return without_padding(out, key_padding_mask)
    out, lse = attend(query, pair, window, additional, bias, scale, backend, return_lse, key_padding_mask)
    return (out, lse) if return_lse else out


def attend(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        backend: Optional[str] = None,
        with_lse: bool = False,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`long_short_attention` of keys and values in one tensor, without checks and without casts for autocast.

    Args:
        query: (B, H, W, h, d).
        pair: (B, H, W, 2, h, d), keys and values.
        window: Which keys of the grid a query sees; none with 0 rows.
        additional: (B, M, 2, h, d), keys and values that every query sees, or None.
        bias: (h, Q, K), added to the scaled logits of the window's keys, or None.
        scale: Factor on query . key.
        backend: As in `long_short_attention`.
        with_lse: Whether the log-sum-exp is needed.
        padding: (B, H, W) bool, true where a token is no key of the windows and its output is 0; None for none.

    Returns:
        out: (B, H, W, h, d) in the dtype of the query.
        lse: (B, h, H, W), the log-sum-exp of each query's logits; undefined unless `with_lse`.
    """
    if torch.jit.is_scripting():
        out, lse = composite_attention(query, pair, window, additional, bias, scale, with_lse, padding)
    else:
        mask = () if padding is None else (padding,)
        if window.rows == 0 or is_empty(query) or (backend is None and is_followed(query, pair, additional, bias)):
            out, lse = composite_attention(query, pair, window, additional, bias, scale, with_lse, *mask)
        else:
            chosen = resolve(backend, query, window, additional, bias, torch.is_grad_enabled(), with_lse)
            if chosen.backward is None:
                out, lse = chosen.forward(query, pair, window, additional, bias, scale, with_lse, *mask)
            else:
                out, lse = torch.ops.ls_vision.long_short_attention(
                    query, pair, additional, bias, window, scale, chosen.name, with_lse, *mask)
                lse = lse.sum(0) if with_lse and chosen.keeps_statistics else lse
    return without_padding(out, padding), lse


def without_padding(x: Tensor, padding: Optional[Tensor]) -> Tensor:
    """(B, H, W, h, d) with 0 where a token is padding."""
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1).unsqueeze(-1), 0.)


@torch.library.custom_op('ls_vision::long_short_attention', mutates_args=())
def _attention(
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        window: Sequence[int],
        scale: float,
        backend: str,
        with_lse: bool,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    mask = () if padding is None else (padding,)
    return BACKENDS[backend].forward(query, pair, Window(*window), additional, bias, scale, with_lse, *mask)


@_attention.register_fake
def _(query, pair, additional, bias, window, scale, backend, with_lse, padding=None):
    B, H, W, h, _ = query.shape
    lse = (B, h, H, W) if with_lse else (0,)
    if BACKENDS[backend].keeps_statistics:
        lse = (2, B, h, H, W)
    dtype = statistics_dtype(query) if lse != (0,) else query.dtype
    return query.new_empty(query.shape), query.new_empty(lse, dtype=dtype)


@torch.library.custom_op('ls_vision::long_short_attention_backward', mutates_args=())
def _attention_backward(
        grad_out: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        window: Sequence[int],
        scale: float,
        backend: str,
        out: Tensor,
        lse: Tensor,
        needs: Sequence[bool],
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, pair, additional keys and values, and bias; no elements where there is none or no need."""
    function = BACKENDS[backend].backward
    assert function is not None
    mask = () if padding is None else (padding,)
    grads = function(
        grad_out, grad_lse, query, pair, Window(*window), additional, bias, scale, out, lse, needs, *mask)
    return tuple(query.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@_attention_backward.register_fake
def _(grad_out, grad_lse, query, pair, additional, bias, window, scale, backend, out, lse, needs, padding=None):
    return tuple(
        x.new_empty(x.shape) if x is not None and needed else query.new_empty(0)
        for x, needed in zip((query, pair, additional, bias), needs))


def _setup_context(ctx, inputs, output) -> None:
    query, pair, additional, bias, window, ctx.scale, ctx.backend, ctx.with_lse, padding = inputs
    ctx.window = tuple(window)
    ctx.save_for_backward(query, pair, additional, bias, *output, padding)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Optional[Tensor], grad_lse: Optional[Tensor]):
    *inputs, out, lse, padding = ctx.saved_tensors
    # the gradient of both parts of the statistics is that of their sum
    grad_lse = (grad_lse[1] if grad_lse.dim() == 5 else grad_lse) if ctx.with_lse and grad_lse is not None else None
    if grad_out is None and grad_lse is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # create_graph=True: somebody differentiates the gradients
        def function(query, pair, additional, bias):
            return composite_attention(
                query, pair, Window(*ctx.window), additional, bias, ctx.scale, grad_lse is not None, padding)
        return (*double_backward.gradients(function, inputs, (grad_out, grad_lse)), *(None,) * 5)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.ls_vision.long_short_attention_backward(
        grad_out, grad_lse, *inputs, ctx.window, ctx.scale, ctx.backend, out, lse, needs, padding)
    return (*(g if needed else None for g, needed in zip(grads, needs)), *(None,) * 5)


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _flops(query_shape, additional_shape, window: Window) -> int:
    """Of one matrix product: 2 per multiply-add, for all windows and keys, also those outside the grid."""
    B, H, W, h, d = query_shape
    nH, nW = num_windows((H, W), window)
    keys = num_keys(window) + (0 if additional_shape is None else additional_shape[1])
    return 2 * B * nH * nW * num_queries(window) * keys * h * d


@register_flop_formula(torch.ops.ls_vision.long_short_attention)
def _forward_flops(query, pair, additional, bias, window, *args, **kwargs) -> int:
    return 2 * _flops(query, additional, Window(*window))


@register_flop_formula(torch.ops.ls_vision.long_short_attention_backward)
def _backward_flops(grad_out, grad_lse, query, pair, additional, bias, window, *args, **kwargs) -> int:
    return 5 * _flops(query, additional, Window(*window))  # the logits again, and two for each product


def check_attention_args(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
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
    elif window.rows == 0:
        raise ValueError('window_size is 0 and there are no additional keys: nothing to attend to.')
    if bias is not None:
        expected = [query.shape[3], num_queries(window), num_keys(window)]
        if list(bias.shape) != expected:
            raise ValueError(f'bias has shape {list(bias.shape)}, expected (heads, queries, keys) = {expected}.')


def check_padding_mask(mask: Optional[Tensor], x: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError where a padding mask of x is no tensor of bools of that shape on its device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f'dtype {mask.dtype}' if isinstance(mask, Tensor) else f'type {type(mask).__name__}'
        raise ValueError(
            f'key_padding_mask has {found}, expected a bool tensor, True where a token is PADDING. A mask of ones for '
            'tokens, as `attention_mask` of transformers, becomes one by `mask == 0`.')
    if mask.shape != torch.Size(shape):
        raise ValueError(f'key_padding_mask has shape {list(mask.shape)}, expected {list(shape)}, one entry per token.')
    if mask.device != x.device:
        raise ValueError(f'key_padding_mask is on {mask.device}, expected {x.device} as the tokens.')
