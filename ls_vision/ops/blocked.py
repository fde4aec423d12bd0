"""Long-short attention in portable PyTorch that never holds all tiles, forward or backward.

Windows that the grid's edges clip alike form a batch of equal, dense attention problems: no padding, no mask. A batch
is worked through in blocks, whose keys and values are gathered into buffers that every block reuses and that fit a
cache. The backward pass gathers them again instead of having kept them.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys, w window size, p key margin; in a block n
windows, Q queries and J = M + (keys inside the grid) keys of a window.
"""
import functools
import math
import threading
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import WindowRun, key_margin, window_runs

BLOCK_ELEMENTS = 2 ** 19  # keys gathered at a time, 2 MB in float32


class Block(NamedTuple):
    """Windows rows x cols of some images, with everything that says where their tokens are."""
    images: slice
    rows: slice
    cols: slice
    row_run: WindowRun
    col_run: WindowRun
    window_size: int

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(images, window rows, window columns)."""
        images, rows, cols = self.images, self.rows, self.cols
        return images.stop - images.start, rows.stop - rows.start, cols.stop - cols.start

    @property
    def num_windows(self) -> int:
        return math.prod(self.shape)

    @property
    def num_queries(self) -> int:
        return self.row_run.query_size * self.col_run.query_size

    @property
    def num_keys(self) -> int:
        return self.row_run.key_size * self.col_run.key_size

    def queries(self, x: Tensor) -> Tensor:
        """View of a raster (B, H, W, ...): (images, rows, cols, query rows, query cols, ...), no token twice."""
        row, col = self.row_run, self.col_run
        return self._windows(x, row.query_start, row.query_size, col.query_start, col.query_size, 1)

    def keys(self, x: Tensor, stride: int = 1, row: int = 0, col: int = 0) -> Tensor:
        """View of a raster: (images, rows, cols, key rows, key cols, ...), tokens in all windows that see them.

        With `stride` every stride-th window from number `row` and `col` on; far enough apart, no token occurs twice.
        """
        a, b = self.row_run, self.col_run
        return self._windows(x, a.key_start, a.key_size, b.key_start, b.key_size, stride, row, col)

    def _windows(
            self,
            x: Tensor,
            row_start: int,
            row_size: int,
            col_start: int,
            col_size: int,
            stride: int,
            row: int = 0,
            col: int = 0,
    ) -> Tensor:
        B, rows, cols = self.shape
        w = self.window_size
        image, y, z, *channels = x.stride()
        start = (row_start + (self.rows.start + row) * w) * y + (col_start + (self.cols.start + col) * w) * z
        # one call in place of slices, unfolds and a permutation, which took a tenth of a small layer's time
        return x.as_strided(
            (B, -(-(rows - row) // stride), -(-(cols - col) // stride), row_size, col_size, *x.shape[3:]),
            (image, stride * w * y, stride * w * z, y, z, *channels),
            x.storage_offset() + self.images.start * image + start)

    def bias(self, bias: Tensor) -> Tensor:
        """View of a (h, w, w, w + 2p, w + 2p) bias: (h, query rows, query cols, key rows, key cols)."""
        row, col = self.row_run, self.col_run
        return bias[
            :, :row.query_size, :col.query_size, row.key_offset:row.key_offset + row.key_size,
            col.key_offset:col.key_offset + col.key_size]


def blocks(query: Tensor, window_size: int, num_additional: int) -> Iterator[Block]:
    """All windows of a (B, H, W, h, d) raster; blocks with the same pair of runs follow one another."""
    B, H, W, h, d = query.shape
    for row_run in window_runs(H, window_size):
        for col_run in window_runs(W, window_size):
            window = (num_additional + row_run.key_size * col_run.key_size) * h * d
            cols = min(col_run.num_windows, max(BLOCK_ELEMENTS // window, 1))
            rows = min(row_run.num_windows, max(BLOCK_ELEMENTS // (window * cols), 1))
            images = min(B, max(BLOCK_ELEMENTS // (window * cols * rows), 1))
            for image in _slices(B, images):
                for row in _slices(row_run.num_windows, rows):
                    for col in _slices(col_run.num_windows, cols):
                        yield Block(image, row, col, row_run, col_run, window_size)


def _slices(length: int, step: int) -> List[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class Buffers(threading.local):
    """Memory for tiles, each kind as large as the largest block that asked for it.

    On the CPU every thread keeps its own from call to call: tiles of a few megabytes are memory that the system takes
    back in between, and to be given it anew, page by page, took longer than to fill it.
    """

    def __init__(self) -> None:
        self.kept: Dict[Tuple[str, torch.dtype], Tensor] = {}

    def take(self, kind: str, like: Tensor, dtype: torch.dtype, shape: Tuple[int, ...]) -> Tensor:
        """A contiguous tensor with anything in it, until the same kind is taken again."""
        numel = math.prod(shape)
        if like.device.type != 'cpu':
            return torch.empty(shape, dtype=dtype, device=like.device)
        memory = self.kept.get((kind, dtype))
        if memory is None or memory.numel() < numel:
            with torch.inference_mode(False):  # what is made in that mode can't be written to outside of it
                memory = self.kept[kind, dtype] = torch.empty(numel, dtype=dtype)
        return memory[:numel].view(shape)


_buffers = Buffers()


def as_pair(key: Tensor, value: Tensor) -> Tensor:
    """(..., h, d) keys and values as one (..., 2, h, d), without a copy where they lie side by side already."""
    offset = value.storage_offset() - key.storage_offset()
    if (
            key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and offset > 0
            and key.stride() == value.stride() and key.dtype == value.dtype
    ):
        shape, stride = key.shape, key.stride()
        return key.as_strided((*shape[:-2], 2, *shape[-2:]), (*stride[:-2], offset, *stride[-2:]))
    return torch.stack([key, value], dim=-3)


def gather_queries(tile: Tensor, x: Tensor, block: Block) -> None:
    """Fills a (n, Q, h, d) tile with queries, or with what has a value for each query."""
    view = block.queries(x)  # (images, rows, cols, y, z, h, d)
    tile.view(view.shape).copy_(view)


def gather_keys(tile: Tensor, pair: Tensor, additional: Optional[Tensor], block: Block) -> None:
    """Fills a (n, J, 2, h, d) tile with additional keys and values (B, M, 2, h, d), then those of the window."""
    view = block.keys(pair)  # (images, rows, cols, y, z, 2, h, d)
    M = 0
    if additional is not None:
        M = additional.shape[1]
        tile[:, :M].view(*block.shape, *additional.shape[1:]).copy_(additional[block.images, None, None])
    tile[:, M:].view(view.shape).copy_(view)


def scatter_queries(out: Tensor, tile: Tensor, block: Block) -> None:
    """Writes a (n, Q, h, d) tile to where `gather_queries` reads."""
    target = block.queries(out)
    target.copy_(tile.view(target.shape))


def scatter_add_keys(out: Tensor, additional: Tensor, tile: Tensor, block: Block) -> None:
    """Adds a (n, J, h, d) tile to where `gather_keys` reads keys or values: a raster and (B, M, h, d) additional."""
    B, rows, cols = block.shape
    M = additional.shape[1]
    if M:
        additional[block.images].add_(tile[:, :M].view(B, rows * cols, *additional.shape[1:]).sum(1))
    tile = tile[:, M:].view(B, rows, cols, block.row_run.key_size, block.col_run.key_size, *tile.shape[2:])
    # windows this far apart share no keys
    side = block.window_size + 2 * key_margin(block.window_size)
    stride = -(-side // block.window_size)
    for row in range(min(stride, rows)):
        for col in range(min(stride, cols)):
            block.keys(out, stride, row, col).add_(tile[:, row::stride, col::stride])


def block_bias(bias: Optional[Tensor], block: Block, num_additional: int, dtype: torch.dtype) -> Optional[Tensor]:
    """(1, h, Q, J) bias of a block, zero for the additional keys."""
    if bias is None:
        return None
    side = block.window_size + 2 * key_margin(block.window_size)
    view = block.bias(bias.reshape(bias.shape[0], block.window_size, block.window_size, side, side))
    mask = _buffers.take('bias', bias, dtype, (1, bias.shape[0], block.num_queries, num_additional + block.num_keys))
    mask[..., :num_additional].zero_()
    mask[0, ..., num_additional:].unflatten(1, view.shape[1:3]).unflatten(3, view.shape[3:]).copy_(view)
    return mask


def blocked_forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
) -> Tensor:
    """The forward pass of `ls_vision.ops.long_short_attention` with a window; arguments are described there."""
    pair = as_pair(key, value)  # (B, H, W, 2, h, d)
    additional, M = _additional_pair(additional_keys, additional_values)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    h, d = query.shape[3:]
    take = functools.partial(_buffers.take, like=query, dtype=query.dtype)
    runs, mask = None, None
    for block in blocks(query, window_size, M):
        if runs != (block.row_run, block.col_run):
            runs, mask = (block.row_run, block.col_run), block_bias(bias, block, M, query.dtype)
        # token by token, so that what is next to each other in the raster stays so
        n, Q, J = block.num_windows, block.num_queries, M + block.num_keys
        q, kv = take('q', shape=(n, Q, h, d)), take('kv', shape=(n, J, 2, h, d))
        gather_queries(q, query, block)
        gather_keys(kv, pair, additional, block)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, h, J, d)
        tile = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)  # (n, h, Q, d)
        scatter_queries(out, tile.transpose(1, 2), block)
    return out


def blocked_backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of query, key, value, additional keys, additional values and bias, all computed in float32."""
    pair = as_pair(key, value)  # (B, H, W, 2, h, d)
    additional, M = _additional_pair(additional_keys, additional_values)
    B, _, _, h, d = query.shape
    f32, device = torch.float32, query.device
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_k, grad_v = (torch.zeros(query.shape, dtype=f32, device=device) for _ in range(2))
    grad_extra_k, grad_extra_v = (torch.zeros(B, M, h, d, dtype=f32, device=device) for _ in range(2))
    side = window_size + 2 * key_margin(window_size)
    grad_bias = torch.zeros(h, window_size, window_size, side, side, dtype=f32, device=device)
    take = functools.partial(_buffers.take, like=query, dtype=f32)
    runs, mask = None, None
    for block in blocks(query, window_size, M):
        if runs != (block.row_run, block.col_run):
            runs, mask = (block.row_run, block.col_run), block_bias(bias, block, M, f32)
        # head by head, as products of many small matrices want it
        n, Q, J = block.num_windows, block.num_queries, M + block.num_keys
        q, do, dq = (take(name, shape=(n * h, Q, d)) for name in ('q', 'do', 'dq'))
        kv, dkv = (take(name, shape=(2, n * h, J, d)) for name in ('kv', 'dkv'))
        p, ds = (take(name, shape=(n * h, Q, J)) for name in ('p', 'ds'))
        gather_queries(q.view(n, h, Q, d).transpose(1, 2), query, block)
        gather_queries(do.view(n, h, Q, d).transpose(1, 2), grad_out, block)
        gather_keys(kv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), pair, additional, block)
        k, v = kv.unbind(0)

        torch.bmm(q.mul_(scale), k.transpose(1, 2), out=p)
        if mask is not None:
            p.view(n, h, Q, J).add_(mask)
        torch.softmax(p, dim=-1, out=p)
        torch.bmm(p.transpose(1, 2), do, out=dkv[1])
        torch.bmm(do, v.transpose(1, 2), out=ds)  # gradient of the weights, then of the logits
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, f32, grad_input=ds)
        torch.bmm(ds.transpose(1, 2), q, out=dkv[0])
        torch.bmm(ds, k, out=dq).mul_(scale)

        scatter_queries(grad_q, dq.view(n, h, Q, d).transpose(1, 2), block)
        dk, dv = dkv.view(2, n, h, J, d).transpose(2, 3).unbind(0)
        scatter_add_keys(grad_k, grad_extra_k, dk, block)
        scatter_add_keys(grad_v, grad_extra_v, dv, block)
        if bias is not None:
            target = block.bias(grad_bias)
            target.add_(ds.view(n, h, Q, J).sum(0)[..., M:].reshape(target.shape))

    extra_k = extra_v = None
    if additional_keys is not None:
        extra_k, extra_v = (g.to(query.dtype) for g in (grad_extra_k, grad_extra_v))
    return (
        grad_q, grad_k.to(query.dtype), grad_v.to(query.dtype), extra_k, extra_v,
        None if bias is None else grad_bias.flatten(3).flatten(1, 2).to(bias.dtype))


def _additional_pair(keys: Optional[Tensor], values: Optional[Tensor]) -> Tuple[Optional[Tensor], int]:
    """(B, M, 2, h, d) additional keys and values, and M."""
    if keys is None or values is None:
        return None, 0
    return as_pair(keys, values), keys.shape[1]
