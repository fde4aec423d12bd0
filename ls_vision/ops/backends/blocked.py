"""Long-short attention in portable PyTorch that never holds all tiles, forward or backward.

Windows that the edges of the grid clip alike form a batch of equal, dense attention problems: no padding, no mask. A
batch is processed in chunks, whose keys and values are gathered into buffers that every chunk reuses and that fit a
cache. The backward pass gathers them again instead of having kept them.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys; in a chunk n windows, Q queries and
J = M + (keys inside the grid) keys of a window.
"""
import functools
import math
import threading
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunks
from ..numerics import masked_logit, statistics_dtype
from ..window import Window, WindowRun, key_size, window_runs
from . import row as one_row

MAX_KEPT_TILES = 512  # views of buffers, a few for each shape of block


class WindowChunk:
    """Windows rows x cols of some images, with everything that says where their tokens are.

    Made once for a plan, which is kept: computing these numbers in each call took a tenth of a small layer's time.
    """

    def __init__(
            self,
            images: slice,
            rows: slice,
            cols: slice,
            row_run: WindowRun,
            col_run: WindowRun,
            window: Window,
    ):
        self.images, self.rows, self.cols = images, rows, cols
        self.row_run, self.col_run, self.window = row_run, col_run, window
        # (images, window rows, window columns)
        self.shape = (images.stop - images.start, rows.stop - rows.start, cols.stop - cols.start)
        self.num_windows = math.prod(self.shape)
        self.num_queries = row_run.query_size * col_run.query_size
        self.num_keys = row_run.key_size * col_run.key_size

    def queries(self, x: Tensor) -> Tensor:
        """View of a raster (B, H, W, ...): (images, rows, cols, query rows, query cols, ...), no token twice."""
        row, col = self.row_run, self.col_run
        return self._windows(x, row.query_start, row.query_size, col.query_start, col.query_size, (1, 1))

    def keys(self, x: Tensor, stride: Tuple[int, int] = (1, 1), row: int = 0, col: int = 0) -> Tensor:
        """View of a raster: (images, rows, cols, key rows, key cols, ...), tokens in all windows that see them.

        With `stride` every stride-th window along each axis, from number `row` and `col` on.
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
            stride: Tuple[int, int],
            row: int = 0,
            col: int = 0,
    ) -> Tensor:
        B, rows, cols = self.shape
        image, y, z, *channels = x.stride()
        next_row, next_col = self.window.rows * y, self.window.cols * z
        start = row_start * y + (self.rows.start + row) * next_row + col_start * z + (self.cols.start + col) * next_col
        # one call: slices, unfolds and a permutation took a tenth of a small layer's time
        return x.as_strided(
            (B, -(-(rows - row) // stride[0]), -(-(cols - col) // stride[1]), row_size, col_size, *x.shape[3:]),
            (image, stride[0] * next_row, stride[1] * next_col, y, z, *channels),
            x.storage_offset() + self.images.start * image + start)


@functools.lru_cache(maxsize=128)
def plan_chunks(
        batch: int,
        feat_size: Tuple[int, int],
        channels: int,
        window: Window,
        num_additional: int,
        elements: int,
) -> List[WindowChunk]:
    """All windows of a raster in chunks of about that many elements of keys, in the order of `run_pairs`."""
    plan = []
    for row_run, col_run in run_pairs(feat_size, window):
        size = (num_additional + row_run.key_size * col_run.key_size) * channels
        cols = min(col_run.num_windows, max(elements // size, 1))
        rows = min(row_run.num_windows, max(elements // (size * cols), 1))
        images = max(min(batch, elements // (size * cols * rows)), 1)
        plan += [
            WindowChunk(image, row, col, row_run, col_run, window)
            for image in chunks.slices(batch, images)
            for row in chunks.slices(row_run.num_windows, rows)
            for col in chunks.slices(col_run.num_windows, cols)
        ]
    return plan


def chunks_of(query: Tensor, window: Window, num_additional: int) -> List[WindowChunk]:
    """The plan for a (B, H, W, h, d) raster."""
    B, H, W, h, d = query.shape
    return plan_chunks(B, (H, W), h * d, window, num_additional, chunks.CHUNK_ELEMENTS)


@functools.lru_cache(maxsize=64)
def run_pairs(feat_size: Tuple[int, int], window: Window) -> List[Tuple[WindowRun, WindowRun]]:
    """Runs of window rows with runs of window columns: the windows of a pair are clipped alike."""
    return [
        (row, col) for row in window_runs(feat_size[0], window.rows, window.row_margin)
        for col in window_runs(feat_size[1], window.cols, window.col_margin)]


class Buffers(threading.local):
    """Memory for tiles, each kind as large as the largest chunk that asked for it.

    On the CPU every thread keeps its own from call to call. Otherwise the system takes back tiles of a few megabytes
    in between, and to get them again, page by page, took longer than to fill them.
    """

    def __init__(self) -> None:
        self.memory: Dict[Tuple[str, torch.dtype], Tensor] = {}
        self.tiles: Dict[Tuple[str, torch.dtype, Tuple[int, ...]], Tensor] = {}  # views of the memory

    def take(self, kind: str, like: Tensor, dtype: torch.dtype, shape: Tuple[int, ...]) -> Tensor:
        """A contiguous tensor of undefined content, valid until the same kind is taken again."""
        if not like.is_cpu:
            return torch.empty(shape, dtype=dtype, device=like.device)
        tile = self.tiles.get((kind, dtype, shape))
        if tile is None:
            tile = self.tiles[kind, dtype, shape] = self._make(kind, dtype, shape)
        return tile

    def _make(self, kind: str, dtype: torch.dtype, shape: Tuple[int, ...]) -> Tensor:
        numel = math.prod(shape)
        memory = self.memory.get((kind, dtype))
        with torch.inference_mode(False):  # a tensor made in that mode can't be written to outside of it
            if memory is None or memory.numel() < numel or len(self.tiles) >= MAX_KEPT_TILES:
                self.tiles.clear()
                if memory is None or memory.numel() < numel:
                    memory = self.memory[kind, dtype] = torch.empty(numel, dtype=dtype)
            return memory[:numel].view(shape)


_buffers = Buffers()


def gather_queries(tile: Tensor, x: Tensor, chunk: WindowChunk) -> None:
    """Fills a (n, Q, h, d) tile with queries, or with what has a value for each query."""
    view = chunk.queries(x)  # (images, rows, cols, query rows, query cols, h, d)
    tile.view(view.shape).copy_(view)


def gather_keys(tile: Tensor, pair: Tensor, additional: Optional[Tensor], chunk: WindowChunk) -> None:
    """Fills a (n, J, 2, h, d) tile with additional keys and values (B, M, 2, h, d), then those of the window."""
    view = chunk.keys(pair)  # (images, rows, cols, key rows, key cols, 2, h, d)
    if additional is not None:
        M = additional.shape[1]
        images, rows, cols = chunk.shape
        tile[:, :M].view(images, rows * cols, *additional.shape[1:]).copy_(additional[chunk.images].unsqueeze(1))
        tile = tile[:, M:]
    tile.view(view.shape).copy_(view)


def scatter_queries(out: Tensor, tile: Tensor, chunk: WindowChunk) -> None:
    """Writes a (n, Q, h, d) tile to where `gather_queries` reads."""
    target = chunk.queries(out)
    target.copy_(tile.view(target.shape))


def scatter_add_keys(out: Tensor, additional: Tensor, tile: Tensor, chunk: WindowChunk) -> None:
    """Adds a (n, J, 2, h, d) tile to where `gather_keys` reads: a raster and (B, M, 2, h, d) additional."""
    B, rows, cols = chunk.shape
    M = additional.shape[1]
    if M:
        additional[chunk.images].add_(tile[:, :M].view(B, rows * cols, *additional.shape[1:]).sum(1))
    tile = tile[:, M:].view(B, rows, cols, chunk.row_run.key_size, chunk.col_run.key_size, *tile.shape[2:])
    # windows this far apart share no keys
    (key_rows, key_cols), window = key_size(chunk.window), chunk.window
    stride = -(-key_rows // window.rows), -(-key_cols // window.cols)
    for row in range(min(stride[0], rows)):
        for col in range(min(stride[1], cols)):
            chunk.keys(out, stride, row, col).add_(tile[:, row::stride[0], col::stride[1]])


Masks = Dict[Tuple[WindowRun, WindowRun], Tensor]


def clipped_biases(
        bias: Optional[Tensor],
        feat_size: Tuple[int, int],
        window: Window,
        num_additional: int,
        dtype: torch.dtype,
) -> Masks:
    """For each pair of runs the (1, h, Q, J) bias of its windows, zero for the additional keys."""
    if bias is None:
        return {}
    bias = F.pad(bias.to(dtype), (num_additional, 0))  # (h, queries, M + K)
    index, sizes = _bias_index(feat_size, window, num_additional, bias.device)
    masks = bias.flatten(0, 1).index_select(1, index).split(sizes, dim=1)  # one lookup for all, (h * queries, J) each
    out = {}
    for (row, col), mask in zip(run_pairs(feat_size, window), masks):
        mask = mask.unflatten(0, (1, bias.shape[0], window.rows, window.cols))
        out[row, col] = mask[:, :, :row.query_size, :col.query_size].flatten(2, 3)
    return out


@functools.lru_cache(maxsize=64)
def _bias_index(
        feat_size: Tuple[int, int],
        window: Window,
        num_additional: int,
        device: torch.device,
) -> Tuple[Tensor, List[int]]:
    """Columns of a padded bias that the windows of each pair of runs see, one pair after the other, and how many."""
    key_rows, key_cols = key_size(window)
    number = torch.arange(key_rows * key_cols).view(key_rows, key_cols) + num_additional
    always = torch.arange(num_additional)
    index = []
    for row, col in run_pairs(feat_size, window):
        rows = slice(row.key_offset, row.key_offset + row.key_size)
        cols = slice(col.key_offset, col.key_offset + col.key_size)
        index.append(torch.cat([always, number[rows, cols].flatten()]))
    with torch.inference_mode(False):
        return torch.cat(index).to(device), [len(i) for i in index]


def blocked_forward(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        with_lse: bool,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Output and, if asked for, log-sum-exp of `ls_vision.ops.attention.attend`, which describes the arguments."""
    if not with_lse and one_row.takes(query, window, bias):
        take = functools.partial(_buffers.take, like=query, dtype=query.dtype)
        return one_row.forward(query, pair, window, additional, scale, padding, take), query.new_empty(0)
    B, H, W, h, d = query.shape
    M = 0 if additional is None else additional.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    statistics = statistics_dtype(query)
    lse = torch.empty(B, H, W, h, 1, dtype=statistics, device=query.device) if with_lse else query.new_empty(0)
    # products and softmax one by one: on two cores a third faster, in float32 alone; SDPA keeps its statistics
    by_products = with_lse or (query.device.type == 'cpu' and query.dtype == torch.float32)
    dtype = statistics if by_products else query.dtype
    take = functools.partial(_buffers.take, like=query, dtype=dtype)
    masks = clipped_biases(bias, (H, W), window, M, dtype)
    for chunk in chunks_of(query, window, M):
        mask = _with_padding(masks.get((chunk.row_run, chunk.col_run)), padding, chunk, M, h, dtype)
        n, Q, J = chunk.num_windows, chunk.num_queries, M + chunk.num_keys
        if by_products:
            # head by head, the layout for products of many small matrices
            q, tile = (take(name, shape=(n * h, Q, d)) for name in ('q', 'out'))
            kv, p = take('kv', shape=(2, n * h, J, d)), take('p', shape=(n * h, Q, J))
            gather_queries(q.view(n, h, Q, d).transpose(1, 2), query, chunk)
            gather_keys(kv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), pair, additional, chunk)
            k, v = kv.unbind(0)
            _fill_logits(p, q, k, mask, scale)
            if with_lse:
                scatter_queries(lse, p.logsumexp(-1).view(n, h, Q, 1).transpose(1, 2), chunk)
            torch.softmax(p, dim=-1, out=p)
            torch.bmm(p, v, out=tile)
            tile = tile.view(n, h, Q, d)
        else:
            # token by token: neighbours in the raster stay neighbours
            q, kv = take('q', shape=(n, Q, h, d)), take('kv', shape=(n, J, 2, h, d))
            gather_queries(q, query, chunk)
            gather_keys(kv, pair, additional, chunk)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, h, J, d)
            tile = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
        scatter_queries(out, tile.transpose(1, 2), chunk)  # from (n, h, Q, d)
    return out, lse.squeeze(-1).permute(0, 3, 1, 2).contiguous() if with_lse else lse


def _with_padding(
        mask: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: WindowChunk,
        num_additional: int,
        num_heads: int,
        dtype: torch.dtype,
) -> Optional[Tensor]:
    """(n, h, Q, J), the (1, h, Q, J) bias of a chunk's windows without weight for keys that are padding."""
    if padding is None:
        return mask
    masked = F.pad(chunk.keys(padding).reshape(-1, 1, 1, chunk.num_keys), (num_additional, 0))  # (n, 1, 1, J)
    if mask is None:
        mask = torch.zeros(1, num_heads, chunk.num_queries, 1, dtype=dtype, device=padding.device)
    return torch.where(masked, masked_logit(dtype), mask)


def _fill_logits(p: Tensor, q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> None:
    """Fills p (n * h, Q, J) with scale * q k^T + mask; mask is (1 or n, h, Q, J)."""
    if mask is not None:
        p.view(-1, *mask.shape[1:]).copy_(mask)
    torch.baddbmm(p, q, k.transpose(1, 2), beta=float(mask is not None), alpha=scale, out=p)


def blocked_backward(
        grad_out: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        out: Tensor,
        lse: Tensor,
        needs: Sequence[bool],
        padding: Optional[Tensor] = None,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of query, keys and values, additional ones, and bias, computed in float32 (doubles in double).

    None for those that do not exist or that `needs` says nobody needs.
    """
    if grad_lse is None and one_row.takes(query, window, bias):
        take = functools.partial(_buffers.take, like=query, dtype=query.dtype)
        return (*one_row.backward(grad_out, query, pair, window, additional, scale, padding, take), None)
    B, H, W, h, d = query.shape
    M = 0 if additional is None else additional.shape[1]
    dtype, device = statistics_dtype(query), query.device
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_pair = torch.zeros(pair.shape, dtype=dtype, device=device)
    grad_additional = torch.zeros(B, M, 2, h, d, dtype=dtype, device=device)
    needs_query, needs_keys, needs_bias = needs[0], needs[1] or needs[2], needs[3] and bias is not None
    grad_bias = torch.zeros(h, window.rows, window.cols, *key_size(window), dtype=dtype, device=device)
    take = functools.partial(_buffers.take, like=query, dtype=dtype)
    masks = clipped_biases(bias, (H, W), window, M, dtype)
    if grad_lse is not None:
        grad_lse = grad_lse.permute(0, 2, 3, 1).unsqueeze(-1)  # (B, H, W, h, 1)
    for chunk in chunks_of(query, window, M):
        mask = _with_padding(masks.get((chunk.row_run, chunk.col_run)), padding, chunk, M, h, dtype)
        # head by head, the layout for products of many small matrices
        n, Q, J = chunk.num_windows, chunk.num_queries, M + chunk.num_keys
        q, do, dq = (take(name, shape=(n * h, Q, d)) for name in ('q', 'do', 'dq'))
        kv, dkv = (take(name, shape=(2, n * h, J, d)) for name in ('kv', 'dkv'))
        p, ds = (take(name, shape=(n * h, Q, J)) for name in ('p', 'ds'))
        gather_queries(q.view(n, h, Q, d).transpose(1, 2), query, chunk)
        gather_queries(do.view(n, h, Q, d).transpose(1, 2), grad_out, chunk)
        gather_keys(kv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), pair, additional, chunk)
        k, v = kv.unbind(0)

        _fill_logits(p, q, k, mask, scale)
        torch.softmax(p, dim=-1, out=p)
        if needs_keys:
            torch.bmm(p.transpose(1, 2), do, out=dkv[1])
        torch.bmm(do, v.transpose(1, 2), out=ds)  # gradient of the weights, then of the logits
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=ds)
        if grad_lse is not None:
            dl = take('dl', shape=(n * h, Q, 1))
            gather_queries(dl.view(n, h, Q, 1).transpose(1, 2), grad_lse, chunk)
            ds.addcmul_(p, dl)
        if needs_keys:
            torch.baddbmm(dkv[0], ds.transpose(1, 2), q, beta=0., alpha=scale, out=dkv[0])
            scatter_add_keys(grad_pair, grad_additional, dkv.view(2, n, h, J, d).permute(1, 3, 0, 2, 4), chunk)
        if needs_query:
            torch.baddbmm(dq, ds, k, beta=0., alpha=scale, out=dq)
            scatter_queries(grad_q, dq.view(n, h, Q, d).transpose(1, 2), chunk)
        if needs_bias:
            row, col = chunk.row_run, chunk.col_run
            target = grad_bias[
                :, :row.query_size, :col.query_size, row.key_offset:row.key_offset + row.key_size,
                col.key_offset:col.key_offset + col.key_size]
            target.add_(ds.view(n, h, Q, J).sum(0)[..., M:].reshape(target.shape))
    return (
        grad_q if needs_query else None,
        grad_pair.to(pair.dtype) if needs[1] else None,
        grad_additional.to(additional.dtype) if additional is not None and needs[2] else None,
        grad_bias.flatten(3).flatten(1, 2).to(bias.dtype) if bias is not None and needs_bias else None)
