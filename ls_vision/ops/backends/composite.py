"""Long-short attention as plain tensor operations on copied tiles of keys and values.

Everything that follows PyTorch's operations follows this one: autograd to any order, functorch, exporters, tracers,
counters. It holds all tiles, K / Q times as many keys as there are tokens, and all logits.

Shapes: B batch, H x W grid, N = H * W, h heads, d head width, M additional keys, T windows; Q queries and K keys of a
window, J = M + K.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import attention_logits, masked_logit, to_dtype
from ..window import Window, window_key_index, window_query_index


def composite_attention(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        scale: float = 1.0,
        with_lse: bool = False,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`ls_vision.ops.attention.attend` as plain operations; arguments and results are described there."""
    feat_size = (query.shape[1], query.shape[2])
    logits, values = tile_logits(query, pair, window, additional, bias, scale, padding)
    out = merge_windows(torch.matmul(to_dtype(logits.softmax(dim=-1), values.dtype), values), feat_size, window)
    if not with_lse:
        return out, query.new_empty(0)
    lse = merge_windows(logits.logsumexp(dim=-1, keepdim=True), feat_size, window)  # (B, H, W, h, 1)
    return out, lse.squeeze(-1).permute(0, 3, 1, 2)


def tile_logits(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Logits of all windows, and the values that their softmax weights.

    Args:
        query: (B, H, W, h, d).
        pair: (B, H, W, 2, h, d), keys and values.
        window: Which keys of the grid a query sees; none with 0 rows.
        additional: (B, M, 2, h, d), seen by every query, or None.
        bias: (h, Q, K), added to the logits of the window's keys, or None.
        scale: Factor on query . key.
        padding: (B, H, W), true where a token is no key of the windows, or None.

    Returns:
        logits: (B, T, h, Q, J) float32, -inf where a key lies outside the grid; (B, 1, h, N, M) without a window.
        values: (B, T, h, J, d).
    """
    B, H, W, h, d = query.shape
    if window.rows == 0:
        assert additional is not None
        q = query.reshape(B, 1, H * W, h, d).transpose(2, 3)
        k, v = additional.unsqueeze(1).permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, 1, h, M, d)
        return attention_logits(q, k, None, scale), v

    to_windows, _ = window_query_index((H, W), window, query.device)  # (T, Q)
    index, inside = window_key_index((H, W), window, query.device)  # (T, K)
    T = index.shape[0]
    q = query.reshape(B, H * W, h, d)[:, to_windows].transpose(2, 3)  # (B, T, h, Q, d)
    tiles = pair.reshape(B, H * W, 2, h, d)[:, index]  # (B, T, K, 2, h, d)
    mask = torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device) if bias is None else to_dtype(bias, query.dtype)
    # a window holds at least one token, so no row of the mask is empty and -inf can't make a NaN
    mask = mask.masked_fill(~inside[:, None, None, :], float('-inf'))  # (T, h or 1, Q or 1, K)
    if padding is not None:
        masked = padding.reshape(B, H * W)[:, index][:, :, None, None, :]  # (B, T, 1, 1, K)
        mask = torch.where(masked & inside[:, None, None, :], masked_logit(mask.dtype), mask)
    if additional is not None:
        M = additional.shape[1]
        tiles = torch.cat([additional[:, None].expand(-1, T, -1, -1, -1, -1), tiles], dim=2)  # (B, T, J, 2, h, d)
        mask = F.pad(mask, (M, 0))
    k, v = tiles.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, T, h, J, d)
    return attention_logits(q, k, mask, scale), v


def merge_windows(x: Tensor, feat_size: Tuple[int, int], window: Window) -> Tensor:
    """(B, T, h, Q, d) -> (B, H, W, h, d), from the windows of `tile_logits` back to the raster."""
    H, W = feat_size
    B, _, h, _, d = x.shape
    x = x.transpose(2, 3)  # (B, T, Q, h, d)
    if window.rows == 0:
        return x.reshape(B, H, W, h, d)
    _, to_raster = window_query_index(feat_size, window, x.device)
    return x.flatten(1, 2)[:, to_raster].reshape(B, H, W, h, d)
