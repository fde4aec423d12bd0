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
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunks
from .geometry import WindowRun, key_margin, window_runs

MAX_KEPT_TILES = 512  # views of buffers, a few for each shape of block


class Block:
    """Windows rows x cols of some images, with everything that says where their tokens are.

    Made once for a plan, which is kept: small layers would otherwise spend a tenth of their time on these numbers.
    """

    def __init__(
            self,
            images: slice,
            rows: slice,
            cols: slice,
            row_run: WindowRun,
            col_run: WindowRun,
            window_size: int,
    ):
        self.images, self.rows, self.cols = images, rows, cols
        self.row_run, self.col_run, self.window_size = row_run, col_run, window_size
        # (images, window rows, window columns)
        self.shape = (images.stop - images.start, rows.stop - rows.start, cols.stop - cols.start)
        self.num_windows = math.prod(self.shape)
        self.num_queries = row_run.query_size * col_run.query_size
        self.num_keys = row_run.key_size * col_run.key_size

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


@functools.lru_cache(maxsize=128)
def plan_blocks(
        batch: int,
        feat_size: Tuple[int, int],
        channels: int,
        window_size: int,
        num_additional: int,
        elements: int,
) -> List[Block]:
    """All windows of a raster in blocks of about so many elements of keys; those of the same pair of runs in a row."""
    blocks = []
    for row_run, col_run in run_pairs(feat_size, window_size):
        window = (num_additional + row_run.key_size * col_run.key_size) * channels
        cols = min(col_run.num_windows, max(elements // window, 1))
        rows = min(row_run.num_windows, max(elements // (window * cols), 1))
        images = min(batch, max(elements // (window * cols * rows), 1))
        blocks += [
            Block(image, row, col, row_run, col_run, window_size)
            for image in chunks.slices(batch, images)
            for row in chunks.slices(row_run.num_windows, rows)
            for col in chunks.slices(col_run.num_windows, cols)
        ]
    return blocks


def blocks_of(query: Tensor, window_size: int, num_additional: int) -> List[Block]:
    """The plan for a (B, H, W, h, d) raster."""
    B, H, W, h, d = query.shape
    return plan_blocks(B, (H, W), h * d, window_size, num_additional, chunks.CHUNK_ELEMENTS)


@functools.lru_cache(maxsize=64)
def run_pairs(feat_size: Tuple[int, int], window_size: int) -> List[Tuple[WindowRun, WindowRun]]:
    """Runs of window rows with runs of window columns: windows of a pair are clipped alike."""
    return [
        (row, col) for row in window_runs(feat_size[0], window_size) for col in window_runs(feat_size[1], window_size)]


class Buffers(threading.local):
    """Memory for tiles, each kind as large as the largest block that asked for it.

    On the CPU every thread keeps its own from call to call: tiles of a few megabytes are memory that the system takes
    back in between, and to be given it anew, page by page, took longer than to fill it.
    """

    def __init__(self) -> None:
        self.memory: Dict[Tuple[str, torch.dtype], Tensor] = {}
        self.tiles: Dict[Tuple[str, torch.dtype, Tuple[int, ...]], Tensor] = {}  # views of the memory

    def take(self, kind: str, like: Tensor, dtype: torch.dtype, shape: Tuple[int, ...]) -> Tensor:
        """A contiguous tensor with anything in it, until the same kind is taken again."""
        if not like.is_cpu:
            return torch.empty(shape, dtype=dtype, device=like.device)
        tile = self.tiles.get((kind, dtype, shape))
        if tile is None:
            tile = self.tiles[kind, dtype, shape] = self._make(kind, dtype, shape)
        return tile

    def _make(self, kind: str, dtype: torch.dtype, shape: Tuple[int, ...]) -> Tensor:
        numel = math.prod(shape)
        memory = self.memory.get((kind, dtype))
        with torch.inference_mode(False):  # what is made in that mode can't be written to outside of it
            if memory is None or memory.numel() < numel or len(self.tiles) >= MAX_KEPT_TILES:
                self.tiles.clear()
                if memory is None or memory.numel() < numel:
                    memory = self.memory[kind, dtype] = torch.empty(numel, dtype=dtype)
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
        images, rows, cols = block.shape
        tile[:, :M].view(images, rows * cols, *additional.shape[1:]).copy_(additional[block.images].unsqueeze(1))
        tile = tile[:, M:]
    tile.view(view.shape).copy_(view)


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


Masks = Dict[Tuple[WindowRun, WindowRun], Tensor]


def clipped_biases(
        bias: Optional[Tensor],
        feat_size: Tuple[int, int],
        window_size: int,
        num_additional: int,
        dtype: torch.dtype,
) -> Masks:
    """For each pair of runs the (1, h, Q, J) bias of its windows, zero for the additional keys."""
    if bias is None:
        return {}
    bias = F.pad(bias.to(dtype), (num_additional, 0))  # (h, w * w, M + K)
    index, sizes = _bias_index(feat_size, window_size, num_additional, bias.device)
    masks = bias.flatten(0, 1).index_select(1, index).split(sizes, dim=1)  # one lookup for all, (h * w * w, J) each
    out = {}
    for (row, col), mask in zip(run_pairs(feat_size, window_size), masks):
        mask = mask.unflatten(0, (1, bias.shape[0], window_size, window_size))
        out[row, col] = mask[:, :, :row.query_size, :col.query_size].flatten(2, 3)
    return out


@functools.lru_cache(maxsize=64)
def _bias_index(
        feat_size: Tuple[int, int],
        window_size: int,
        num_additional: int,
        device: torch.device,
) -> Tuple[Tensor, List[int]]:
    """Columns of a padded bias that the windows of each pair of runs see, one pair after the other, and how many."""
    side = window_size + 2 * key_margin(window_size)
    number = torch.arange(side * side).view(side, side) + num_additional
    always = torch.arange(num_additional)
    index = []
    for row, col in run_pairs(feat_size, window_size):
        rows = slice(row.key_offset, row.key_offset + row.key_size)
        cols = slice(col.key_offset, col.key_offset + col.key_size)
        index.append(torch.cat([always, number[rows, cols].flatten()]))
    with torch.inference_mode(False):
        return torch.cat(index).to(device), [len(i) for i in index]


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
    _, H, W, h, d = query.shape
    take = functools.partial(_buffers.take, like=query, dtype=query.dtype)
    masks = clipped_biases(bias, (H, W), window_size, M, query.dtype)
    by_products = query.device.type == 'cpu' and query.dtype == torch.float32
    for block in blocks_of(query, window_size, M):
        mask = masks.get((block.row_run, block.col_run))
        n, Q, J = block.num_windows, block.num_queries, M + block.num_keys
        if by_products:  # a third faster than the other way, on two cores and in float32 alone
            # head by head, as products of many small matrices want it
            q, tile = (take(name, shape=(n * h, Q, d)) for name in ('q', 'out'))
            kv, p = take('kv', shape=(2, n * h, J, d)), take('p', shape=(n * h, Q, J))
            gather_queries(q.view(n, h, Q, d).transpose(1, 2), query, block)
            gather_keys(kv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), pair, additional, block)
            k, v = kv.unbind(0)
            _attention_weights(p, q, k, mask, scale)
            torch.bmm(p, v, out=tile)
            tile = tile.view(n, h, Q, d)
        else:
            # token by token, so that what is next to each other in the raster stays so
            q, kv = take('q', shape=(n, Q, h, d)), take('kv', shape=(n, J, 2, h, d))
            gather_queries(q, query, block)
            gather_keys(kv, pair, additional, block)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, h, J, d)
            tile = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
        scatter_queries(out, tile.transpose(1, 2), block)  # from (n, h, Q, d)
    return out


def _attention_weights(p: Tensor, q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> None:
    """Fills p (n * h, Q, J) with the softmax of scale * q k^T + mask; mask is (1, h, Q, J)."""
    if mask is not None:
        p.view(-1, *mask.shape[1:]).copy_(mask)
    torch.baddbmm(p, q, k.transpose(1, 2), beta=float(mask is not None), alpha=scale, out=p)
    torch.softmax(p, dim=-1, out=p)


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
    B, H, W, h, d = query.shape
    f32, device = torch.float32, query.device
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_k, grad_v = (torch.zeros(query.shape, dtype=f32, device=device) for _ in range(2))
    grad_extra_k, grad_extra_v = (torch.zeros(B, M, h, d, dtype=f32, device=device) for _ in range(2))
    side = window_size + 2 * key_margin(window_size)
    grad_bias = torch.zeros(h, window_size, window_size, side, side, dtype=f32, device=device)
    take = functools.partial(_buffers.take, like=query, dtype=f32)
    masks = clipped_biases(bias, (H, W), window_size, M, f32)
    for block in blocks_of(query, window_size, M):
        mask = masks.get((block.row_run, block.col_run))
        # head by head, as products of many small matrices want it
        n, Q, J = block.num_windows, block.num_queries, M + block.num_keys
        q, do, dq = (take(name, shape=(n * h, Q, d)) for name in ('q', 'do', 'dq'))
        kv, dkv = (take(name, shape=(2, n * h, J, d)) for name in ('kv', 'dkv'))
        p, ds = (take(name, shape=(n * h, Q, J)) for name in ('p', 'ds'))
        gather_queries(q.view(n, h, Q, d).transpose(1, 2), query, block)
        gather_queries(do.view(n, h, Q, d).transpose(1, 2), grad_out, block)
        gather_keys(kv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), pair, additional, block)
        k, v = kv.unbind(0)

        _attention_weights(p, q, k, mask, scale)
        torch.bmm(p.transpose(1, 2), do, out=dkv[1])
        torch.bmm(do, v.transpose(1, 2), out=ds)  # gradient of the weights, then of the logits
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, f32, grad_input=ds)
        torch.baddbmm(dkv[0], ds.transpose(1, 2), q, beta=0., alpha=scale, out=dkv[0])
        torch.baddbmm(dq, ds, k, beta=0., alpha=scale, out=dq)

        scatter_queries(grad_q, dq.view(n, h, Q, d).transpose(1, 2), block)
        dk, dv = dkv.view(2, n, h, J, d).transpose(2, 3).unbind(0)
        scatter_add_keys(grad_k, grad_extra_k, dk, block)
        scatter_add_keys(grad_v, grad_extra_v, dv, block)
        if bias is not None:
            row, col = block.row_run, block.col_run
            target = grad_bias[
                :, :row.query_size, :col.query_size, row.key_offset:row.key_offset + row.key_size,
                col.key_offset:col.key_offset + col.key_size]
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
