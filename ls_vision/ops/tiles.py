"""Long-short attention on gathered tiles: plain tensor operations that autograd and exporters follow at any size.

Shapes: B batch, H x W grid, N = H * W, h heads, d head width, M additional keys, w window size, nH x nW windows,
T = nH * nW, Q = w * w queries and K = (w + 2p)^2 keys of a window, p the key margin.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import num_windows, window_key_index, window_query_index


def merge_windows(x: Tensor, feat_size: Tuple[int, int], window_size: int) -> Tensor:
    """(B * T, h, Q, d) -> (B, H, W, h, d), from the windows of `gather_tiles` back to the raster."""
    H, W = feat_size
    nH, nW = num_windows(feat_size, window_size)
    h, d = x.shape[1], x.shape[3]
    _, to_raster = window_query_index(feat_size, window_size, x.device)
    x = x.transpose(1, 2).reshape(-1, nH * nW * window_size * window_size, h, d)
    return x[:, to_raster].reshape(-1, H, W, h, d)


def gather_tiles(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor] = None,
        additional_values: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Lays out the attention as one batch of small dense ones.

    Args:
        query, key, value: (B, H, W, h, d).
        window_size: w; 0 attends to the additional keys alone.
        additional_keys, additional_values: (B, M, h, d), seen by every query.
        bias: (h, Q, K), added to the logits of the window's keys.

    Returns:
        q: (B * T, h, Q, d), without a window (B, h, N, d).
        k, v: (B * T, h, M + K, d), without a window (B, h, M, d).
        mask: (B * T, h or 1, Q or 1, M + K) to add to the logits; None without a window.
    """
    B, H, W, h, d = query.shape
    if window_size == 0:
        assert additional_keys is not None and additional_values is not None
        q = query.reshape(B, H * W, h, d).transpose(1, 2)
        return q, additional_keys.transpose(1, 2), additional_values.transpose(1, 2), None

    index, inside = window_key_index((H, W), window_size, query.device)  # (T, K)
    T = index.shape[0]
    k = key.reshape(B, H * W, h, d)[:, index]  # (B, T, K, h, d)
    v = value.reshape(B, H * W, h, d)[:, index]
    mask = torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device) if bias is None else bias.to(query.dtype)
    # a window holds at least one token, so no row of the mask is empty and -inf can't make a NaN
    mask = mask.masked_fill(~inside[:, None, None, :], float('-inf'))  # (T, h or 1, Q or 1, K)
    if additional_keys is not None and additional_values is not None:
        M = additional_keys.shape[1]
        k = torch.cat([additional_keys[:, None].expand(-1, T, -1, -1, -1), k], dim=2)  # (B, T, M + K, h, d)
        v = torch.cat([additional_values[:, None].expand(-1, T, -1, -1, -1), v], dim=2)
        mask = F.pad(mask, (M, 0))
    to_windows, _ = window_query_index((H, W), window_size, query.device)  # (T, Q)
    q = query.reshape(B, H * W, h, d)[:, to_windows].flatten(0, 1).transpose(1, 2)
    return q, k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1).transpose(1, 2), mask.repeat(B, 1, 1, 1)
