"""Long-short attention, slow and obvious: every query against every key of the image, most of them masked.

Every other backend is tested against this one. Memory and time grow with the square of the number of tokens.

Shapes: B batch, H x W grid, N = H * W, h heads, d head width, M additional keys; Q queries and K keys of a window.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..numerics import masked_logit, statistics_dtype
from ..window import Window, key_size


def reference_attention(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        scale: float = 1.0,
        with_lse: bool = True,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Dense form of `ls_vision.ops.attention.attend`; arguments and results are described there."""
    B, H, W, h, d = query.shape
    N = H * W
    dtype = query.dtype
    statistics = statistics_dtype(query)
    q = query.reshape(B, N, h, d).transpose(1, 2).to(statistics) * scale  # (B, h, N, d)

    logits, values = [], []
    if additional is not None:
        k, v = additional.to(statistics).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, M, d)
        logits.append(q @ k.transpose(-2, -1))
        values.append(v)
    if window.rows > 0:
        k, v = pair.reshape(B, N, 2, h, d).to(statistics).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, N, d)
        dots = q @ k.transpose(-2, -1)  # (B, h, N, N)
        in_window, number = window_pairs((H, W), window, query.device)
        if bias is not None:
            dots = dots + bias.to(statistics).flatten(1)[:, number]  # (h, N, N)
        dots = dots.masked_fill(~in_window, float('-inf'))
        if padding is not None:
            dots = dots.masked_fill(padding.reshape(B, 1, 1, N) & in_window, masked_logit(statistics))
        logits.append(dots)
        values.append(v)

    all_logits = torch.cat(logits, dim=-1)
    out = all_logits.softmax(dim=-1) @ torch.cat(values, dim=2)  # (B, h, N, d)
    lse = all_logits.logsumexp(dim=-1).unflatten(-1, (H, W))
    return out.transpose(1, 2).reshape(B, H, W, h, d).to(dtype), lse


def window_pairs(feat_size: Tuple[int, int], window: Window, device: torch.device) -> Tuple[Tensor, Tensor]:
    """For all (query, key) pairs of a grid: whether the query's window has the key, and the pair's entry of the bias.

    Returns:
        in_window: (N, N) bool.
        number: (N, N) in 0 .. Q * K - 1; of no meaning outside of the window.
    """
    H, W = feat_size
    key_rows, key_cols = key_size(window)
    token = torch.arange(H * W, device=device)
    row, col = token // W, token % W
    # position of each key among the keys of each query's window
    key_row = row[None, :] - (row // window.rows * window.rows - window.row_margin)[:, None]  # (N, N)
    key_col = col[None, :] - (col // window.cols * window.cols - window.col_margin)[:, None]
    in_window = (key_row >= 0) & (key_row < key_rows) & (key_col >= 0) & (key_col < key_cols)
    query_number = (row % window.rows) * window.cols + col % window.cols  # (N,), in 0 .. Q - 1
    key_number = key_row.clamp(0, key_rows - 1) * key_cols + key_col.clamp(0, key_cols - 1)  # (N, N), in 0 .. K - 1
    return in_window, query_number[:, None] * (key_rows * key_cols) + key_number
