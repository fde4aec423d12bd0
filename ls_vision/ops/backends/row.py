"""Windows of a sequence, a grid of one row: keys and values are gathered once, and windows are overlapping views.

The tiles of `blocked` hold a key once for each window that sees it, and the additional keys once for every window. In a
row, windows of gathered keys are views, and all queries of a sequence and head meet the additional keys in one product.

The lines of all sequences and heads lie one after the other, each with room for x windows more than it has, so that the
windows of all of them form one batch. The windows in between are of no meaning: their queries are 0.

Shapes: h heads, d head width, M additional keys; in a chunk I images, n windows of w queries and K keys, J = M + K,
x = ceil((K - w) / w), T = (n + x) * w tokens of a line, A = I * h * (n + x) windows of all lines.
"""
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from ..numerics import masked_logit, statistics_dtype
from ..window import key_size

SHORTEST_RUN = 8  # windows; fewer are computed as on any grid

Take = Callable[..., Tensor]


def takes(query: Tensor, bias: Optional[Tensor]) -> bool:
    """True where runs of windows are computed here."""
    return query.is_cpu and query.dtype == statistics_dtype(query) and query.shape[1] == 1 and bias is None


class Lines:
    """The lines of a chunk, and views and sums of their windows."""

    def __init__(self, chunk: Any, num_heads: int, width: int, take: Take):
        self.chunk, self.take = chunk, take
        self.I, self.n, self.h, self.d = chunk.shape[0], chunk.shape[2], num_heads, width
        self.w, self.K = chunk.window.cols, chunk.num_keys
        self.T = (self.n + (self.K - 1) // self.w) * self.w
        self.A = self.I * self.h * self.T // self.w

    def queries(self, x: Tensor) -> Tensor:
        """View (I, h, n * w, d) of a raster (B, 1, N, h, d)."""
        return self.chunk.queries(x)[:, 0, :, 0].flatten(1, 2).transpose(1, 2)

    def keys(self, pair: Tensor) -> Tensor:
        """View (2, I, h, (n - 1) * w + K, d) of a raster (B, 1, N, 2, h, d), of no token twice."""
        view = self.chunk.keys(pair)[:, 0, :, 0]  # (I, n, K, 2, h, d)
        strides = view.stride()
        rows = view.as_strided(
            (self.I, (self.n - 1) * self.w + self.K, *view.shape[3:]), (strides[0], *strides[2:]),
            view.storage_offset())
        return rows.permute(2, 0, 3, 1, 4)

    def gather_queries(self, kind: str, x: Tensor) -> Tensor:
        """(I * h, T, d), 0 where no query is."""
        lines = self.take(kind, shape=(self.I, self.h, self.T, self.d))
        lines[:, :, :self.n * self.w] = self.queries(x)
        lines[:, :, self.n * self.w:] = 0.
        return lines.flatten(0, 1)

    def gather_keys(self, kind: str, pair: Tensor) -> Tensor:
        """(2, I * h * T + K, d)."""
        lines, source = self._key_lines(kind), self.keys(pair)
        for i in range(2):
            _by_line(lines[i], self)[:, :, :source.shape[3]] = source[i]
            _by_line(lines[i], self)[:, :, source.shape[3]:] = 0.
        lines[:, self.I * self.h * self.T:] = 0.
        return lines

    def windows(self, lines: Tensor, first: int = 0, step: int = 1) -> Tensor:
        """Overlapping view (A, K, d) of lines (I * h * T + K, d); every step-th window from the first on."""
        count = (self.A - first + step - 1) // step
        return lines.as_strided(
            (count, self.K, self.d), (step * self.w * self.d, self.d, 1),
            lines.storage_offset() + first * self.w * self.d)

    def add_windows(self, target: Tensor, tiles: Tensor) -> None:
        """Adds tiles (2, A, K, d) to the raster (B, 1, N, 2, h, d)."""
        total, keys = self._key_lines('total').zero_(), self.keys(target)
        step = -(-key_size(self.chunk.window)[1] // self.w)  # windows this far apart share no keys
        for kind in range(2):
            for first in range(min(step, self.A)):
                self.windows(total[kind], first, step).add_(tiles[kind, first::step])
            keys[kind].add_(_by_line(total[kind], self)[:, :, :keys.shape[3]])

    def _key_lines(self, kind: str) -> Tensor:
        return self.take(kind, shape=(2, self.I * self.h * self.T + self.K, self.d))


def _by_line(lines: Tensor, of: Lines) -> Tensor:
    """(I * h * T + K, d) -> (I, h, T, d)."""
    return lines[:-of.K].view(of.I, of.h, of.T, of.d)


class Tiles(NamedTuple):
    """What a chunk multiplies, and its weights."""
    q: Tensor
    """(I * h, T, d)."""
    k: Tensor
    """(A, K, d), overlapping, as is `v`."""
    v: Tensor
    k_more: Tensor
    """(I * h, M, d), as is `v_more`."""
    v_more: Tensor
    p: Tensor
    """(I * h, T, J), weights of the additional keys and then of the window's."""


def gather(
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        lines: Lines,
        scale: float,
) -> Tiles:
    """Gathers a chunk's tiles and computes its weights."""
    take, (I, h, d) = lines.take, (lines.I, lines.h, lines.d)
    M = 0 if additional is None else additional.shape[1]
    q = lines.gather_queries('q', query)
    k, v = (lines.windows(rows) for rows in lines.gather_keys('kv', pair))
    more = take('more', shape=(2, I, h, M, d))
    if additional is not None:
        more.copy_(additional[lines.chunk.images].permute(2, 0, 3, 1, 4))
    k_more, v_more = more.flatten(1, 2).unbind(0)
    p = products(q, k, k_more, lines, 'p', scale, padding)
    torch.softmax(p, dim=-1, out=p)
    return Tiles(q, k, v, k_more, v_more, p)


def products(
        x: Tensor,
        of_window: Tensor,
        more: Tensor,
        lines: Lines,
        kind: str,
        scale: float,
        padding: Optional[Tensor] = None,
) -> Tensor:
    """scale * x [more, of_window]^T, (I * h, T, J) of (I * h, T, d), (I * h, M, d) and (A, K, d); no weight at padding.

    Products write whole tensors, which are then joined: into parts of one they would go matrix by matrix.
    """
    (A, w, K, d), M = (lines.A, lines.w, lines.K, lines.d), more.shape[1]
    near, far = lines.take('near', shape=(A, w, K)), lines.take('far', shape=(*x.shape[:2], M))
    torch.baddbmm(near, x.view(A, w, d), of_window.transpose(1, 2), beta=0., alpha=scale, out=near)
    if padding is not None:
        masked = lines.chunk.keys(padding)[:, None, 0, :, 0, None]  # (I, 1, n, 1, K)
        by_line = near.view(lines.I, lines.h, -1, w, K)[:, :, :lines.n]
        by_line.masked_fill_(masked, masked_logit(near.dtype))
    if M:
        torch.baddbmm(far, x, more.transpose(1, 2), beta=0., alpha=scale, out=far)
    out = lines.take(kind, shape=(*x.shape[:2], M + K))
    return torch.cat([far, near.view(*x.shape[:2], K)], dim=-1, out=out)


def of_windows(x: Tensor, lines: Lines) -> Tensor:
    """View (A, w, K) of (I * h, T, J): what belongs to the windows' keys."""
    return x.view(lines.A, lines.w, -1)[..., -lines.K:]


def write(target: Tensor, tile: Tensor, weights: Tensor, more: Tensor, lines: Lines, scale: float) -> None:
    """Writes tile + scale * weights more, of (A, w, d), (I * h, T, M) and (I * h, M, d), to (B, 1, N, h, d)."""
    tile = tile.view(lines.I * lines.h, lines.T, lines.d)
    if more.shape[1]:
        torch.baddbmm(tile, weights, more, alpha=scale, out=tile)
    lines.queries(target).copy_(tile.unflatten(0, (lines.I, lines.h))[:, :, :lines.n * lines.w])


def forward(
        out: Tensor,
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
        scale: float,
        take: Take,
) -> None:
    """Writes the outputs of a chunk to `out`, (B, 1, N, h, d)."""
    lines = Lines(chunk, query.shape[3], query.shape[4], take)
    tiles = gather(query, pair, additional, padding, lines, scale)
    tile = take('out', shape=(lines.A, lines.w, lines.d))
    torch.bmm(of_windows(tiles.p, lines), tiles.v, out=tile)
    write(out, tile, tiles.p[..., :-lines.K], tiles.v_more, lines, 1.)


def backward(
        grad_out: Tensor,
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
        scale: float,
        take: Take,
        grad_q: Tensor,
        grad_pair: Tensor,
        grad_additional: Tensor,
) -> None:
    """Writes a chunk's gradient of the queries and adds those of keys and values."""
    lines = Lines(chunk, query.shape[3], query.shape[4], take)
    tiles = gather(query, pair, additional, padding, lines, scale)
    (A, w, K, d), M, p = (lines.A, lines.w, lines.K, lines.d), tiles.k_more.shape[1], tiles.p
    do, q_window = lines.gather_queries('do', grad_out), tiles.q.view(A, w, d)
    dkv, dkv_more = take('dkv', shape=(2, A, K, d)), take('dkv more', shape=(2, *tiles.k_more.shape))
    near = take('near', shape=(A, w, K))

    near.copy_(of_windows(p, lines))  # products that transpose it are twice as fast on a copy
    torch.bmm(near.transpose(1, 2), do.view(A, w, d), out=dkv[1])
    if M:
        torch.bmm(p[..., :M].transpose(1, 2), do, out=dkv_more[1])
    ds = products(do, tiles.v, tiles.v_more, lines, 'ds', 1.)
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)

    near.copy_(of_windows(ds, lines))
    torch.baddbmm(dkv[0], near.transpose(1, 2), q_window, beta=0., alpha=scale, out=dkv[0])
    dq = take('dq', shape=(A, w, d))
    torch.baddbmm(dq, near, tiles.k, beta=0., alpha=scale, out=dq)
    write(grad_q, dq, ds[..., :M], tiles.k_more, lines, scale)
    lines.add_windows(grad_pair, dkv)
    if M:
        torch.baddbmm(dkv_more[0], ds[..., :M].transpose(1, 2), tiles.q, beta=0., alpha=scale, out=dkv_more[0])
        target = grad_additional[chunk.images].permute(2, 0, 3, 1, 4)
        target.add_(dkv_more.unflatten(1, (lines.I, lines.h)))
