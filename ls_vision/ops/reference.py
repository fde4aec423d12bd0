"""Long-short attention, slow and obvious: every query against every key of the image, most of them masked.

The measure of every other path. Memory and time grow with the square of the number of tokens.

Shapes: B batch, H x W grid, N = H * W, h heads, d head width, M additional keys, w window size, p key margin,
Q = w * w queries and K = (w + 2p)^2 keys of a window.
"""
from typing import Optional

import torch
from torch import Tensor

from .geometry import key_margin


def reference_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor] = None,
        additional_values: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        scale: float = 1.0,
) -> Tensor:
    """Dense reference of `ls_vision.ops.long_short_attention`; arguments and result are described there."""
    B, H, W, h, d = query.shape
    N = H * W
    dtype = query.dtype
    q = query.reshape(B, N, h, d).transpose(1, 2).float() * scale  # (B, h, N, d)

    logits, values = [], []
    if additional_keys is not None and additional_values is not None:
        logits.append(q @ additional_keys.permute(0, 2, 3, 1).float())  # (B, h, N, M)
        values.append(additional_values.transpose(1, 2).float())  # (B, h, M, d)
    if window_size > 0:
        k = key.reshape(B, N, h, d).transpose(1, 2).float()
        dots = q @ k.transpose(-1, -2)  # (B, h, N, N)
        in_window, pair = _pairs(H, W, window_size, query.device)
        if bias is not None:
            dots = dots + bias.float().flatten(1)[:, pair]  # (h, N, N)
        logits.append(dots.masked_fill(~in_window, float('-inf')))
        values.append(value.reshape(B, N, h, d).transpose(1, 2).float())

    attn = torch.cat(logits, dim=-1).softmax(dim=-1)
    out = attn @ torch.cat(values, dim=2)  # (B, h, N, d)
    return out.transpose(1, 2).reshape(B, H, W, h, d).to(dtype)


def _pairs(H: int, W: int, window_size: int, device: torch.device):
    """For all (query, key) pairs of an H x W grid: is the key in the query's square, and which bias entry is theirs."""
    margin = key_margin(window_size)
    side = window_size + 2 * margin
    token = torch.arange(H * W, device=device)
    row, col = token // W, token % W
    # position of each key in the square of each query's window, both counted from the square's corner
    key_row = row[None, :] - (row // window_size * window_size - margin)[:, None]  # (N, N)
    key_col = col[None, :] - (col // window_size * window_size - margin)[:, None]
    in_window = (key_row >= 0) & (key_row < side) & (key_col >= 0) & (key_col < side)
    query_number = (row % window_size) * window_size + col % window_size  # (N,), in 0 .. Q - 1
    key_number = key_row.clamp(0, side - 1) * side + key_col.clamp(0, side - 1)  # (N, N), in 0 .. K - 1
    return in_window, query_number[:, None] * side ** 2 + key_number
