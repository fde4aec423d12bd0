"""Where the overlapping 2-D windows of long-short attention lie (paper, section 3.1; released implementation).

Shapes: H x W grid of local tokens, w window size, p key margin, nH x nW grid of windows,
Q = w * w queries of a window, K = (w + 2p)^2 keys of a window.

Queries are grouped into non-overlapping w x w windows, the first at the grid's top left corner. A window's keys are
the square of w + 2p tokens a side centred on it. A grid that is not divisible by w is covered by windows that reach
over its lower and right edge; queries and keys outside the grid do not exist and are masked.
"""
from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor


def key_margin(window_size: int) -> int:
    """p, the number of tokens by which a window's keys reach over its queries on each side."""
    return max(window_size // 2, 1)


def num_windows(feat_size: Tuple[int, int], window_size: int) -> Tuple[int, int]:
    """(nH, nW), the windows that cover a grid."""
    return (feat_size[0] + window_size - 1) // window_size, (feat_size[1] + window_size - 1) // window_size


def window_offsets(window_size: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Row and column distance, query minus key, of every pair in a window: two (Q, K) tensors of integers."""
    margin = key_margin(window_size)
    query = torch.arange(window_size, device=device)
    key = torch.arange(-margin, window_size + margin, device=device)
    delta = query[:, None] - key[None, :]  # (w, w + 2p)
    side = key.shape[0]
    rows = delta[:, None, :, None].expand(-1, window_size, -1, side)
    cols = delta[None, :, None, :].expand(window_size, -1, side, -1)
    return rows.reshape(-1, side * side), cols.reshape(-1, side * side)


def window_query_index(feat_size: Tuple[int, int], window_size: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Where each window's queries are in the raster of the grid, and where each token is in the list of windows.

    Args:
        feat_size: (H, W) of the grid in tokens.
        window_size: w.
        device: Where to put the result.

    Returns:
        to_windows: (nH * nW, Q) token numbers, those of queries outside the grid clamped to its edge.
        to_raster: (H * W,) numbers in the flattened list of windows.
    """
    H, W = feat_size
    nH, nW = num_windows(feat_size, window_size)
    query = torch.arange(window_size, device=device)
    rows = (torch.arange(nH, device=device)[:, None] * window_size + query).clamp(max=H - 1)  # (nH, w)
    cols = (torch.arange(nW, device=device)[:, None] * window_size + query).clamp(max=W - 1)  # (nW, w)
    to_windows = rows[:, None, :, None] * W + cols[None, :, None, :]  # (nH, nW, w, w)
    row = torch.arange(H, device=device)[:, None]
    col = torch.arange(W, device=device)[None, :]
    window = (row // window_size) * nW + col // window_size  # (H, W)
    to_raster = (window * window_size + row % window_size) * window_size + col % window_size
    return to_windows.reshape(-1, window_size * window_size), to_raster.flatten()


def window_key_index(feat_size: Tuple[int, int], window_size: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Where each window's keys are in the raster of the grid.

    Args:
        feat_size: (H, W) of the grid in tokens.
        window_size: w.
        device: Where to put the result.

    Returns:
        index: (nH * nW, K) token numbers, those of keys outside the grid clamped to its edge.
        inside: (nH * nW, K), false where a key lies outside the grid.
    """
    H, W = feat_size
    nH, nW = num_windows(feat_size, window_size)
    margin = key_margin(window_size)
    key = torch.arange(-margin, window_size + margin, device=device)
    rows = torch.arange(nH, device=device)[:, None] * window_size + key  # (nH, w + 2p)
    cols = torch.arange(nW, device=device)[:, None] * window_size + key  # (nW, w + 2p)
    row_inside = (rows >= 0) & (rows < H)
    col_inside = (cols >= 0) & (cols < W)
    index = rows.clamp(0, H - 1)[:, None, :, None] * W + cols.clamp(0, W - 1)[None, :, None, :]
    inside = row_inside[:, None, :, None] & col_inside[None, :, None, :]  # (nH, nW, w + 2p, w + 2p)
    num_keys = key.shape[0] * key.shape[0]
    return index.reshape(-1, num_keys), inside.reshape(-1, num_keys)


class WindowRun(NamedTuple):
    """Consecutive windows along one axis that the grid's edges clip alike, so that they are one batch without a mask.

    Window number i of the run has the queries from `query_start + i * w` on and the keys from `key_start + i * w` on.
    """
    num_windows: int
    query_start: int
    query_size: int
    key_start: int
    key_size: int
    key_offset: int
    """Where in the square of w + 2p keys the first key lies that is inside the grid."""


def window_runs(length: int, window_size: int) -> List[WindowRun]:
    """The runs of windows along an axis of `length` tokens, first to last."""
    margin = key_margin(window_size)
    runs: List[WindowRun] = []
    for start in range(0, length, window_size):
        key_start, key_stop = max(start - margin, 0), min(start + window_size + margin, length)
        clipping = (min(window_size, length - start), key_stop - key_start, key_start - (start - margin))
        if runs and (runs[-1].query_size, runs[-1].key_size, runs[-1].key_offset) == clipping:
            runs[-1] = runs[-1]._replace(num_windows=runs[-1].num_windows + 1)
        else:
            runs.append(WindowRun(1, start, clipping[0], key_start, clipping[1], clipping[2]))
    return runs
