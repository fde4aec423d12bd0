"""Relative position biases: of a window's logits, and of full attention over a grid.

Both are tables with one row per relative position and one column per head. A table is first laid out as a dense map of
offsets (rows x columns of distances) and then looked up or resampled.

Shapes: h heads, w window size, p key margin, Q = w * w queries and K = (w + 2p)^2 keys of a window, g global tokens,
H x W grid, N = H * W, S = 2 * (w + p) - 1 distinct offsets per axis of a window.
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.graph_sizes import are_equal
from ..ops.numerics import at_least_float32, to_dtype
from ..ops.window import key_size, make_window, window_offsets

WINDOW_BIASES = ('released', 'unique')


WindowSize = Union[int, Tuple[int, int]]


def window_bias_rows(window_size: WindowSize, kind: str) -> int:
    """Number of rows of a window's bias table."""
    rows, cols = _num_offsets(window_size)
    if kind == 'unique':
        return rows * cols
    if window_size == 1:
        return 1
    return (rows - 1) * key_size(make_window(window_size))[1] + cols


def _num_offsets(window_size: WindowSize) -> Tuple[int, int]:
    """Distinct row and column offsets of a window, from -(size + margin - 1) up."""
    window = make_window(window_size)
    return 2 * (window.rows + window.row_margin) - 1, 2 * (window.cols + window.col_margin) - 1


def window_bias_index(window_size: WindowSize, kind: str, device: torch.device) -> Tensor:
    """Row of the bias table for each pair in a window.

    Args:
        window_size: w >= 1, or (rows, columns).
        kind: 'released' numbers offsets as the released weights need it, with a row stride of 2 * (w // 2) + w, less
            than the number of column offsets, so that distinct offsets share rows; 'unique' gives each its own.
        device: Device of the result.

    Returns:
        (Q, K) int64; (1, 1) for released windows of 1.
    """
    window = make_window(window_size)
    rows, cols = window_offsets(window, device)
    rows, cols = rows + window.rows + window.row_margin - 1, cols + window.cols + window.col_margin - 1  # from 0 up
    if kind == 'unique':
        return rows * _num_offsets(window_size)[1] + cols
    if window_size == 1:
        return torch.zeros_like(rows[:, :1])  # the released table and index have one entry for all 3 x 3 keys
    return rows * key_size(window)[1] + cols


def resize_window_bias(
        table: Tensor,
        window_size: WindowSize,
        kind: str,
        source_size: Optional[WindowSize] = None,
) -> Tensor:
    """Resamples a window's bias table for another window size (bicubic, over the map of offsets).

    Args:
        table: (rows, h) of any window size, of either kind.
        window_size: w of the result, or (rows, columns).
        kind: Kind of the result.
        source_size: Size of the table's window, of the same kind; by default that of a square one, found by its rows.

    Returns:
        (window_bias_rows(window_size, kind), h); the table itself where it already fits.

    Raises:
        ValueError: No window size has a table with that number of rows.
    """
    if source_size is None:
        if table.shape[0] == window_bias_rows(window_size, kind):
            return table
        source_size, source_kind = _identify_window_bias(table.shape[0], kind)
    else:
        source_kind = kind
    offsets = _offset_rows(source_size, source_kind, table.device)  # (S, S) of the source
    dense = at_least_float32(table).t()[:, offsets]  # (h, S, S)
    dense = _resize_map(dense, _num_offsets(window_size)).flatten(1)  # (h, offsets of the result)
    # where offsets share a row it becomes their mean
    target = _offset_rows(window_size, kind, table.device).flatten()
    rows = window_bias_rows(window_size, kind)
    total = dense.new_zeros(dense.shape[0], rows).index_add_(1, target, dense)
    count = dense.new_zeros(rows).index_add_(0, target, torch.ones_like(dense[0]))
    return (total / count.clamp(min=1)).t().to(table.dtype).contiguous()


def _identify_window_bias(num_rows: int, kind: str) -> Tuple[int, str]:
    """Window size and kind of a table with `num_rows` rows, `kind` if both would fit."""
    for candidate in (kind, *(k for k in WINDOW_BIASES if k != kind)):
        for window_size in range(1, 65):
            if window_bias_rows(window_size, candidate) == num_rows:
                return window_size, candidate
    raise ValueError(f'A window bias table with {num_rows} rows fits no window size from 1 to 64.')


def _offset_rows(window_size: WindowSize, kind: str, device: torch.device) -> Tensor:
    """(S, S) row of the table for every row and column offset, both from -(w + p - 1) up."""
    rows, cols = _num_offsets(window_size)
    number = window_bias_index(window_size, 'unique', device)
    index = window_bias_index(window_size, kind, device)
    out = torch.zeros(rows * cols, dtype=index.dtype, device=device)
    out[number.flatten()] = index.expand_as(number).flatten()
    return out.view(rows, cols)


def grid_bias_rows(feat_size: Tuple[int, int]) -> int:
    """Number of rows of full attention's bias table for a grid."""
    return (2 * feat_size[0] - 1) * (2 * feat_size[1] - 1)


def resize_grid_bias(table: Tensor, feat_size: Tuple[int, int], new_feat_size: Tuple[int, int]) -> Tensor:
    """Resamples full attention's bias table for another grid (bicubic, differentiable).

    Args:
        table: ((2H - 1) * (2W - 1), h) for `feat_size`.
        feat_size: (H, W) of the table.
        new_feat_size: (H', W') of the result.

    Returns:
        ((2H' - 1) * (2W' - 1), h); the table itself where the grid is the same.
    """
    if torch.jit.is_scripting():
        is_native = feat_size[0] == new_feat_size[0] and feat_size[1] == new_feat_size[1]
    else:
        # a graph of open size can't ask whether this is the native one, for which resampling changes nothing
        is_native = are_equal(feat_size[0], new_feat_size[0]) and are_equal(feat_size[1], new_feat_size[1])
    if is_native:
        return table
    size = (2 * feat_size[0] - 1, 2 * feat_size[1] - 1)
    dense = at_least_float32(table.t().reshape(table.shape[1], size[0], size[1]))  # (h, 2H - 1, 2W - 1)
    dense = _resize_map(dense, (2 * new_feat_size[0] - 1, 2 * new_feat_size[1] - 1))
    return to_dtype(dense.flatten(1).t(), table.dtype)


def grid_bias(
        table: Tensor,
        global_to_global: Optional[Tensor],
        global_and_local: Optional[Tensor],
        feat_size: Tuple[int, int],
        new_feat_size: Tuple[int, int],
) -> Tensor:
    """Bias of full attention over [global tokens | grid].

    Args:
        table: ((2H - 1) * (2W - 1), h), row (dy + H - 1) * (2W - 1) + dx + W - 1 for distance (dy, dx).
        global_to_global: (h, g, g); None without global tokens.
        global_and_local: (2, h, g), added to logits of global queries with local keys and of local with global; None
            without global tokens.
        feat_size: (H, W) of the table.
        new_feat_size: (H', W') of the tokens, N of them; the table is resampled where it differs.

    Returns:
        (h, g + N, g + N).
    """
    h = table.shape[1]
    g = 0 if global_to_global is None else global_to_global.shape[1]
    table = resize_grid_bias(table, feat_size, new_feat_size).t()  # (h, rows)
    if global_to_global is not None and global_and_local is not None:
        # entries of the global tokens follow those of the grid: g * g with each other, g of global queries, g of keys
        table = torch.cat([table, global_to_global.flatten(1), global_and_local.transpose(0, 1).flatten(1)], dim=1)
    L = g + new_feat_size[0] * new_feat_size[1]
    # one lookup, whose results already lie as the attention wants them: several times faster than `table[index]`
    return table.contiguous().index_select(1, _grid_bias_index(new_feat_size, g, table.device)).view(h, L, L)


def _grid_bias_index(feat_size: Tuple[int, int], g: int, device: torch.device) -> Tensor:
    """(L * L,) number in the table of each pair's bias."""
    H, W = feat_size
    # a token's number in the table's map: a pair's entry is their difference, counted from that of no distance
    number = torch.arange(H, device=device)[:, None] * (2 * W - 1) + torch.arange(W, device=device)  # (H, W)
    number = number.flatten()
    index = (number + (H - 1) * (2 * W - 1) + (W - 1))[:, None] - number[None, :]  # (H * W, H * W)
    if g > 0:
        first = (2 * H - 1) * (2 * W - 1)
        own = torch.arange(first, first + g * g, device=device).view(g, g)
        other = torch.arange(first + g * g, first + g * (g + 2), device=device).view(2, g)
        top = torch.cat([own, other[0][:, None].expand(-1, H * W)], dim=1)
        bottom = torch.cat([other[1][None, :].expand(H * W, -1), index], dim=1)
        index = torch.cat([top, bottom])
    return index.flatten()


def _resize_map(x: Tensor, size: Tuple[int, int]) -> Tensor:
    """(h, rows, columns) -> (h, *size)."""
    return F.interpolate(x.unsqueeze(0), size=size, mode='bicubic', align_corners=False).squeeze(0)
