"""Long-short attention as a function of tensors.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys, w window size, p = max(w // 2, 1) key margin,
Q = w * w queries and K = (w + 2p)^2 keys of a window.
"""
from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from .tiles import gather_tiles, merge_windows


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
        dropout_p: Probability with which an attention weight is dropped.

    Returns:
        (B, H, W, h, d), in the dtype of the query.

    Raises:
        ValueError: A shape or the window size does not fit.
    """
    check_attention_args(query, key, value, window_size, additional_keys, additional_values, bias)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    H, W = query.shape[1], query.shape[2]
    q, k, v, mask = gather_tiles(query, key, value, window_size, additional_keys, additional_values, bias)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if window_size == 0:
        return out.transpose(1, 2).reshape(query.shape)
    return merge_windows(out, (H, W), window_size)


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
