"""Geometry of the overlapping 2-D windows of long-short attention (paper, section 3.1; released implementation).

Shapes: H x W grid of local tokens, nH x nW grid of windows, T = nH * nW; in a window Q queries and K keys.

Queries form non-overlapping windows, the first at the top left corner of the grid. The keys of a window are the
rectangle around it, larger by a margin on each side. Windows cover a grid that they don't divide by reaching over its
lower and right edge. Queries and keys outside the grid do not exist and are masked.
"""
from numbers import Integral
from typing import Any, List, NamedTuple, Tuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Size of a window in queries, and by how many tokens its keys reach over it on each side."""
    rows: int
    cols: int
    row_margin: int
    col_margin: int


def square_window(window_size: int) -> Window:
    """The released w x w window, whose margin is max(w // 2, 1); no window for w = 0."""
    margin = max(window_size // 2, 1) if window_size > 0 else 0
    return Window(window_size, window_size, margin, margin)


def make_window(window_size: Any) -> Window:
    """The window of a size w, a pair of sizes (rows, columns), or itself.

    Raises:
        ValueError: It is none of these, a size or margin is negative, or only one of both sizes is 0.
    """
    if isinstance(window_size, Window):
        window = window_size
    elif isinstance(window_size, Integral):
        window = square_window(int(window_size))
    else:
        pair = window_size if isinstance(window_size, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(size, Integral) for size in pair):
            raise ValueError(f'window_size is {window_size!r}, expected a whole number or a pair (rows, columns).')
        rows, cols = (square_window(size) for size in window_size)
        window = Window(rows.rows, cols.cols, rows.row_margin, cols.col_margin)
    if min(window) < 0 or (min(window.rows, window.cols) == 0 and max(window.rows, window.cols) > 0):
        raise ValueError(
            f'window_size is {window_size}, expected 0 (no window), or 1 or more queries a side and margins of 0 or '
            'more.')
    return window


def window_size_of(window: Window) -> Any:
    """What `make_window` makes the window of: w, or (rows, columns) where they differ."""
    return window.rows if window.rows == window.cols else (window.rows, window.cols)


def num_queries(window: Window) -> int:
    """Q."""
    return window.rows * window.cols


def key_size(window: Window) -> Tuple[int, int]:
    """Rows and columns of a window's keys."""
    return window.rows + 2 * window.row_margin, window.cols + 2 * window.col_margin


def num_keys(window: Window) -> int:
    """K."""
    rows, cols = key_size(window)
    return rows * cols


def num_windows(feat_size: Tuple[int, int], window: Window) -> Tuple[int, int]:
    """(nH, nW), the windows that cover a grid."""
    return (feat_size[0] + window.rows - 1) // window.rows, (feat_size[1] + window.cols - 1) // window.cols


def window_offsets(window: Window, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Row and column distance, query minus key, of every pair in a window: two (Q, K) tensors of integers."""
    key_rows, key_cols = key_size(window)
    query_row, query_col = torch.arange(window.rows, device=device), torch.arange(window.cols, device=device)
    key_row = torch.arange(-window.row_margin, window.rows + window.row_margin, device=device)
    key_col = torch.arange(-window.col_margin, window.cols + window.col_margin, device=device)
    rows = (query_row[:, None] - key_row[None, :])[:, None, :, None].expand(-1, window.cols, -1, key_cols)
    cols = (query_col[:, None] - key_col[None, :])[None, :, None, :].expand(window.rows, -1, key_rows, -1)
    num_keys = key_rows * key_cols
    return rows.reshape(-1, num_keys), cols.reshape(-1, num_keys)


def tile_grid(feat_size: Tuple[int, int], window: Window) -> Tuple[int, int]:
    """(nH, nW) as a graph with open sizes has them: one window a side is two, the second a copy of the first.

    Tracers of open sizes make a size of 1 a constant, and a program exported at 224 x 224 would refuse larger images.
    """
    nH, nW = num_windows(feat_size, window)
    if not torch.jit.is_scripting():
        if isinstance(nH, torch.SymInt):
            nH = torch.sym_max(nH, 2)
        if isinstance(nW, torch.SymInt):
            nW = torch.sym_max(nW, 2)
    return nH, nW


def _positions(length: int, tiles: int, size: int, margin: int, device: torch.device) -> Tensor:
    """(tiles, size + 2 * margin) positions along an axis of `length` tokens; outside of it, negative or too large."""
    span = size + 2 * margin
    i = torch.arange(tiles * span, device=device)
    first = (i // span * size).clamp(max=(length - 1) // size * size)
    return (first + i % span - margin).view(tiles, span)


def window_query_index(feat_size: Tuple[int, int], window: Window, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Where the queries of each window are in the raster of the grid, and where each token is in the list of windows.

    Args:
        feat_size: (H, W) of the grid in tokens.
        window: Window of at least one query.
        device: Device of the result.

    Returns:
        to_windows: (T, Q) token numbers, T as `tile_grid` counts; queries outside the grid are clamped to its edge.
        to_raster: (H * W,) numbers in the flattened list of windows.
    """
    H, W = feat_size
    nH, nW = tile_grid(feat_size, window)
    rows = _positions(H, nH, window.rows, 0, device).clamp(max=H - 1)  # (nH, rows)
    cols = _positions(W, nW, window.cols, 0, device).clamp(max=W - 1)  # (nW, cols)
    to_windows = rows[:, None, :, None] * W + cols[None, :, None, :]  # (nH, nW, rows, cols)
    row = torch.arange(H, device=device)[:, None]
    col = torch.arange(W, device=device)[None, :]
    number = (row // window.rows) * nW + col // window.cols  # (H, W)
    to_raster = (number * window.rows + row % window.rows) * window.cols + col % window.cols
    return _in_list(to_windows), to_raster.flatten()


def window_key_index(feat_size: Tuple[int, int], window: Window, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Where the keys of each window are in the raster of the grid.

    Args:
        feat_size: (H, W) of the grid in tokens.
        window: Window of at least one query.
        device: Device of the result.

    Returns:
        index: (T, K) token numbers, T as `tile_grid` counts; keys outside the grid are clamped to its edge.
        inside: (T, K), false where a key lies outside the grid.
    """
    H, W = feat_size
    nH, nW = tile_grid(feat_size, window)
    rows = _positions(H, nH, window.rows, window.row_margin, device)  # (nH, key rows)
    cols = _positions(W, nW, window.cols, window.col_margin, device)  # (nW, key columns)
    row_inside = (rows >= 0) & (rows < H)
    col_inside = (cols >= 0) & (cols < W)
    index = rows.clamp(0, H - 1)[:, None, :, None] * W + cols.clamp(0, W - 1)[None, :, None, :]
    inside = row_inside[:, None, :, None] & col_inside[None, :, None, :]  # (nH, nW, key rows, key columns)
    return _in_list(index), _in_list(inside)


def _in_list(x: Tensor) -> Tensor:
    """(nH, nW, rows, columns) -> (T, rows * columns)."""
    x = x.flatten(2)
    # of one row of open length, an exporter could not prove that it may be flattened
    return x[0] if x.shape[0] == 1 else x.flatten(0, 1)


class WindowRun(NamedTuple):
    """Consecutive windows along one axis that the edges of the grid clip alike: one batch that needs no mask.

    Window number i of the run has the queries from `query_start + i * size` on and the keys from
    `key_start + i * size` on.
    """
    num_windows: int
    query_start: int
    query_size: int
    key_start: int
    key_size: int
    key_offset: int
    """Number, within the window's keys, of the first key inside the grid."""


def window_runs(length: int, size: int, margin: int) -> List[WindowRun]:
    """The runs of windows along an axis of `length` tokens, first to last."""
    runs: List[WindowRun] = []
    for start in range(0, length, size):
        key_start, key_stop = max(start - margin, 0), min(start + size + margin, length)
        clipping = (min(size, length - start), key_stop - key_start, key_start - (start - margin))
        if runs and (runs[-1].query_size, runs[-1].key_size, runs[-1].key_offset) == clipping:
            runs[-1] = runs[-1]._replace(num_windows=runs[-1].num_windows + 1)
        else:
            runs.append(WindowRun(1, start, clipping[0], key_start, clipping[1], clipping[2]))
    return runs
