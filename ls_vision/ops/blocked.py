"""Long-short attention in portable PyTorch that never holds all tiles, forward or backward.

Windows that the grid's edges clip alike form a batch of equal, dense attention problems: no padding, no mask. A batch
is worked through in blocks, whose keys and values are gathered into buffers that every block reuses and that fit a
cache. The backward pass gathers them again instead of having kept them.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys, w window size, p key margin; in a block n
windows, Q queries and J = M + (keys inside the grid) keys of a window.
"""
from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import WindowRun, key_margin, window_runs

BLOCK_ELEMENTS = 2 ** 20  # keys gathered at a time, 4 MB in float32


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
        return tuple(s.stop - s.start for s in (self.images, self.rows, self.cols))  # type: ignore[return-value]

    def queries(self, x: Tensor) -> Tensor:
        """View of a (B, H, W, h, d) raster: (images, rows, cols, query rows, query cols, h, d), no token twice."""
        row, col = self.row_run, self.col_run
        return self._windows(x, row.query_start, row.query_size, col.query_start, col.query_size, 1)

    def keys(self, x: Tensor, stride: int = 1, row: int = 0, col: int = 0) -> Tensor:
        """View of a raster: (images, rows, cols, key rows, key cols, h, d), tokens in all windows that see them.

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
        w = self.window_size
        y = slice(row_start + (self.rows.start + row) * w, row_start + (self.rows.stop - 1) * w + row_size)
        z = slice(col_start + (self.cols.start + col) * w, col_start + (self.cols.stop - 1) * w + col_size)
        x = x[self.images, y, z]
        x = x.unfold(1, row_size, stride * w).unfold(2, col_size, stride * w)  # (b, rows, cols, h, d, y, z)
        return x.permute(0, 1, 2, 5, 6, 3, 4)

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


class Buffer:
    """Memory for one kind of tile, as large as the largest block that asked for it."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.memory = torch.empty(0, dtype=dtype, device=like.device)

    def take(self, *shape: int) -> Tensor:
        numel = 1
        for size in shape:
            numel *= size
        if self.memory.numel() < numel:
            self.memory = self.memory.new_empty(numel)
        return self.memory[:numel].view(shape)


def gather_keys(buffer: Buffer, x: Tensor, additional: Optional[Tensor], block: Block) -> Tensor:
    """Additional keys, then those of the window, head by head: (n * h, J, d)."""
    view = block.keys(x).permute(0, 1, 2, 5, 3, 4, 6)  # (images, rows, cols, h, y, z, d)
    B, rows, cols, h, y, z, d = view.shape
    M = 0 if additional is None else additional.shape[1]
    tile = buffer.take(B, rows, cols, h, M + y * z, d)
    if additional is not None:
        tile[..., :M, :] = additional[block.images, None, None].transpose(-3, -2)
    tile[..., M:, :].unflatten(4, (y, z)).copy_(view)
    return tile.view(-1, M + y * z, d)


def gather_queries(buffer: Buffer, x: Tensor, block: Block) -> Tensor:
    """Queries, or what has a value for each query, head by head: (n * h, Q, d)."""
    view = block.queries(x).permute(0, 1, 2, 5, 3, 4, 6)  # (images, rows, cols, h, y, z, d)
    tile = buffer.take(*view.shape)
    return tile.copy_(view).view(-1, view.shape[4] * view.shape[5], view.shape[6])


def scatter_queries(out: Tensor, tile: Tensor, block: Block) -> None:
    """Writes a (n * h, Q, d) tile to where `gather_queries` reads."""
    target = block.queries(out).permute(0, 1, 2, 5, 3, 4, 6)
    target.copy_(tile.view(target.shape))


def scatter_add_keys(out: Tensor, additional: Tensor, tile: Tensor, block: Block) -> None:
    """Adds a (n * h, J, d) tile to where `gather_keys` reads: a raster and (B, h, M, d) additional keys."""
    B, rows, cols = block.shape
    M = additional.shape[2]
    tile = tile.view(B, rows, cols, -1, tile.shape[1], tile.shape[2])
    if M:
        additional[block.images].add_(tile[..., :M, :].sum((1, 2)))
    tile = tile[..., M:, :].unflatten(4, (block.row_run.key_size, block.col_run.key_size)).permute(0, 1, 2, 4, 5, 3, 6)
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
    view = block.bias(bias.unflatten(1, (block.window_size, -1)).unflatten(3, (side, side)))
    return F.pad(view.flatten(3).flatten(1, 2).to(dtype), (num_additional, 0)).unsqueeze(0)


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
    M = 0 if additional_keys is None else additional_keys.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    q_buffer, k_buffer, v_buffer = (Buffer(query, query.dtype) for _ in range(3))
    h = query.shape[3]
    runs, mask = None, None
    for block in blocks(query, window_size, M):
        if runs != (block.row_run, block.col_run):
            runs, mask = (block.row_run, block.col_run), block_bias(bias, block, M, query.dtype)
        q = gather_queries(q_buffer, query, block).unflatten(0, (-1, h))
        k = gather_keys(k_buffer, key, additional_keys, block).unflatten(0, (-1, h))
        v = gather_keys(v_buffer, value, additional_values, block).unflatten(0, (-1, h))
        tile = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (n, h, Q, d)
        scatter_queries(out, tile, block)
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
        out: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of query, key, value, additional keys, additional values and bias, all computed in float32."""
    M = 0 if additional_keys is None else additional_keys.shape[1]
    B, _, _, h, d = query.shape
    f32, device = torch.float32, query.device
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_k, grad_v = (torch.zeros(query.shape, dtype=f32, device=device) for _ in range(2))
    grad_extra_k, grad_extra_v = (torch.zeros(B, h, M, d, dtype=f32, device=device) for _ in range(2))
    side = window_size + 2 * key_margin(window_size)
    grad_bias = torch.zeros(h, window_size, window_size, side, side, dtype=f32, device=device)
    buffers = [Buffer(query, f32) for _ in range(10)]
    runs, mask = None, None
    for block in blocks(query, window_size, M):
        if runs != (block.row_run, block.col_run):
            runs, mask = (block.row_run, block.col_run), block_bias(bias, block, M, f32)
        q = gather_queries(buffers[0], query, block)  # (n * h, Q, d)
        o = gather_queries(buffers[1], out, block)
        do = gather_queries(buffers[2], grad_out, block)
        k = gather_keys(buffers[3], key, additional_keys, block)  # (n * h, J, d)
        v = gather_keys(buffers[4], value, additional_values, block)
        (nh, Q, _), J = q.shape, k.shape[1]

        p = torch.bmm(q.mul_(scale), k.transpose(1, 2), out=buffers[5].take(nh, Q, J))
        if mask is not None:
            p.view(-1, h, Q, J).add_(mask)
        torch.softmax(p, dim=-1, out=p)
        dv = torch.bmm(p.transpose(1, 2), do, out=buffers[6].take(nh, J, d))
        ds = torch.bmm(do, v.transpose(1, 2), out=buffers[7].take(nh, Q, J))
        ds.sub_(o.mul_(do).sum(-1, keepdim=True)).mul_(p)  # gradient of the logits
        dk = torch.bmm(ds.transpose(1, 2), q, out=buffers[8].take(nh, J, d))
        dq = torch.bmm(ds, k, out=buffers[9].take(nh, Q, d)).mul_(scale)

        scatter_queries(grad_q, dq, block)
        scatter_add_keys(grad_k, grad_extra_k, dk, block)
        scatter_add_keys(grad_v, grad_extra_v, dv, block)
        if bias is not None:
            target = block.bias(grad_bias)
            target.add_(ds.view(-1, h, Q, J).sum(0)[..., M:].reshape(target.shape))

    extra_k = extra_v = None
    if additional_keys is not None:
        extra_k, extra_v = (g.transpose(1, 2).to(query.dtype) for g in (grad_extra_k, grad_extra_v))
    return (
        grad_q, grad_k.to(query.dtype), grad_v.to(query.dtype), extra_k, extra_v,
        None if bias is None else grad_bias.flatten(3).flatten(1, 2).to(bias.dtype))
