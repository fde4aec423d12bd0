"""Windows of a sequence, a grid of one row: keys and values are gathered once, and windows are overlapping views.

The tiles of `blocked` hold a key once for each window that sees it, and the additional keys once for every window. In a
row, windows of gathered keys are views, and all queries of a sequence and head meet the additional keys in one product.

The lines of all sequences and heads lie one after the other, each with room for x windows more than it has, so that the
windows of all of them form one batch. The windows in between are of no meaning: their queries are 0, and so are those
that the last window has beyond the sequence. Keys beyond the ends are masked.

Shapes: B batch, N tokens, h heads, d head width, M additional keys; in a part I sequences, n windows of w queries and K
keys, p keys of it on each side, J = M + K, x = ceil((K - w) / w), T = (n + x) * w tokens of a line, A = I * h * (n + x)
windows of all lines.
"""
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunks
from ..numerics import masked_logit, statistics_dtype
from ..window import Window, key_size

SHORTEST_ROW = 8  # windows; fewer are computed as on any grid

Take = Callable[..., Tensor]


def takes(query: Tensor, window: Window, bias: Optional[Tensor]) -> bool:
    """True where the windows are computed here."""
    return (
        query.is_cpu and query.dtype == statistics_dtype(query) and query.shape[1] == 1 and bias is None
        and query.shape[2] > (SHORTEST_ROW - 1) * window.cols)


class Lines:
    """The lines of a part, windows first to last of some sequences, and views and sums of their windows."""

    def __init__(self, query: Tensor, window: Window, images: slice, windows: slice, take: Take):
        self.N, self.h, self.d = query.shape[2:]
        self.w, self.p, self.K = window.cols, window.col_margin, key_size(window)[1]
        self.images, self.first, self.take = images, windows.start, take
        self.I, self.n = images.stop - images.start, windows.stop - windows.start
        self.T = (self.n + (self.K - 1) // self.w) * self.w
        self.A = self.I * self.h * self.T // self.w
        start, stop = windows.start * self.w, windows.stop * self.w
        self.queries = slice(start, min(stop, self.N))
        self.keys = slice(max(start - self.p, 0), min(stop + self.p, self.N))
        self.left = self.keys.start - (start - self.p)  # keys before the first token
        # keys that windows of the part before see as well
        self.seen = min(start + self.p, self.N) - self.keys.start if start else 0

    def gather_queries(self, kind: str, x: Tensor) -> Tensor:
        """(I * h, T, d) of a raster (B, 1, N, h, d), 0 where no query is."""
        lines = self.take(kind, shape=(self.I, self.h, self.T, self.d))
        self._fill(lines, x[self.images, 0, self.queries].transpose(1, 2), 0)
        return lines.flatten(0, 1)

    def scatter_queries(self, target: Tensor, lines: Tensor) -> None:
        """Writes (I * h, T, d) to where `gather_queries` reads."""
        part = target[self.images, 0, self.queries].transpose(1, 2)  # (I, h, queries, d)
        part.copy_(lines.view(self.I, self.h, self.T, self.d)[:, :, :part.shape[2]])

    def gather_keys(self, kind: str, pair: Tensor) -> Tensor:
        """(2, I * h * T + K, d) of a raster (B, 1, N, 2, h, d), 0 where no key is."""
        lines, source = self._key_lines(kind), self._keys(pair)
        for i in range(2):
            self._fill(self._by_line(lines[i]), source[i], self.left)
        lines[:, self.I * self.h * self.T:] = 0.
        return lines

    def windows(self, lines: Tensor) -> Tensor:
        """Overlapping view (A, K, d) of lines (I * h * T + K, d)."""
        return lines.as_strided((self.A, self.K, self.d), (self.w * self.d, self.d, 1), lines.storage_offset())

    def add_windows(self, target: Tensor, tiles: Tensor) -> None:
        """Adds tiles (2, A, K, d) to the raster (B, 1, N, 2, h, d), whose parts come in order and need no zeros."""
        total, raster = self._key_lines('total'), self._keys(target)
        for kind in range(2):
            # all windows' keys 0 .. w - 1, which lie side by side, then the next w, which begin one window later
            for start in range(0, self.K, self.w):
                part = tiles[kind, :, start:start + self.w]
                own = total[kind, start:start + self.A * self.w].view(self.A, self.w, self.d)[:, :part.shape[1]]
                if start == 0:
                    own.copy_(part)
                    total[kind, self.A * self.w:] = 0.
                else:
                    own.add_(part)
            sums = self._by_line(total[kind])[:, :, self.left:self.left + raster.shape[3]]
            raster[kind][:, :, :self.seen].add_(sums[:, :, :self.seen])
            raster[kind][:, :, self.seen:] = sums[:, :, self.seen:]

    def hide(self, logits: Tensor, padding: Optional[Tensor]) -> None:
        """Masks keys that do not exist or are padding, (B, 1, N), in logits (A, w, K)."""
        logits = logits.view(self.I, self.h, -1, self.w, self.K)[:, :, :self.n]
        if padding is not None:
            line = F.pad(padding[self.images, 0, self.keys], (self.left, self.T + self.K))
            masked = line.unfold(1, self.K, self.w)[:, None, :self.n, None]  # (I, 1, n, 1, K)
            logits.masked_fill_(masked, masked_logit(logits.dtype))
        for i in range(self.n):  # from the left end
            before = self.p - (self.first + i) * self.w
            if before <= 0:
                break
            logits[:, :, i, :, :before] = float('-inf')
        for i in reversed(range(self.n)):  # from the right end
            inside = self.N - ((self.first + i) * self.w - self.p)
            if inside >= self.K:
                break
            logits[:, :, i, :, inside:] = float('-inf')

    def _keys(self, pair: Tensor) -> Tensor:
        """View (2, I, h, keys, d) of a raster (B, 1, N, 2, h, d)."""
        return pair[self.images, 0, self.keys].permute(2, 0, 3, 1, 4)

    def _key_lines(self, kind: str) -> Tensor:
        return self.take(kind, shape=(2, self.I * self.h * self.T + self.K, self.d))

    def _by_line(self, lines: Tensor) -> Tensor:
        """(I * h * T + K, d) -> (I, h, T, d)."""
        return lines[:-self.K].view(self.I, self.h, self.T, self.d)

    def _fill(self, lines: Tensor, source: Tensor, start: int) -> None:
        """Writes (I, h, tokens, d) into (I, h, T, d) from a place on, and zeros around."""
        stop = start + source.shape[2]
        lines[:, :, start:stop] = source
        lines[:, :, stop:] = 0.
        if start:
            lines[:, :, :start] = 0.


def parts(query: Tensor, window: Window, num_additional: int, take: Take) -> Iterator[Lines]:
    """All windows of all sequences, in parts of about `chunks.CHUNK_ELEMENTS` logits."""
    num_windows = -(-query.shape[2] // window.cols)
    logits = query.shape[3] * window.cols * (num_additional + key_size(window)[1])
    windows = min(max(chunks.CHUNK_ELEMENTS // logits, 1), num_windows)
    for images in chunks.slices(query.shape[0], max(chunks.CHUNK_ELEMENTS // (logits * windows), 1)):
        for some in chunks.slices(num_windows, windows):
            yield Lines(query, window, images, some, take)


class Tiles(NamedTuple):
    """What a part multiplies, and its weights."""
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
    """Gathers a part's tiles and computes its weights."""
    M = 0 if additional is None else additional.shape[1]
    q = lines.gather_queries('q', query)
    k, v = (lines.windows(rows) for rows in lines.gather_keys('kv', pair))
    more = lines.take('more', shape=(2, lines.I, lines.h, M, lines.d))
    if additional is not None:
        more.copy_(additional[lines.images].permute(2, 0, 3, 1, 4))
    k_more, v_more = more.flatten(1, 2).unbind(0)
    near, far = products(q, k, k_more, lines, scale)
    lines.hide(near, padding)
    p = join(near, far, lines, 'p')
    torch.softmax(p, dim=-1, out=p)
    return Tiles(q, k, v, k_more, v_more, p)


def products(x: Tensor, of_window: Tensor, more: Tensor, lines: Lines, scale: float) -> Tuple[Tensor, Tensor]:
    """scale * x of_window^T, (A, w, K), and scale * x more^T, (I * h, T, M), of (I * h, T, d).

    Two tensors that `join` makes one: into parts of one, products would go matrix by matrix.
    """
    (A, w, K, d), M = (lines.A, lines.w, lines.K, lines.d), more.shape[1]
    near, far = lines.take('near', shape=(A, w, K)), lines.take('far', shape=(*x.shape[:2], M))
    torch.baddbmm(near, x.view(A, w, d), of_window.transpose(1, 2), beta=0., alpha=scale, out=near)
    if M:
        torch.baddbmm(far, x, more.transpose(1, 2), beta=0., alpha=scale, out=far)
    return near, far


def join(near: Tensor, far: Tensor, lines: Lines, kind: str) -> Tensor:
    """(I * h, T, J) of (A, w, K) and (I * h, T, M)."""
    out = lines.take(kind, shape=(*far.shape[:2], far.shape[2] + lines.K))
    return torch.cat([far, near.view(*far.shape[:2], lines.K)], dim=-1, out=out)


def of_windows(x: Tensor, lines: Lines) -> Tensor:
    """View (A, w, K) of (I * h, T, J): what belongs to the windows' keys."""
    return x.view(lines.A, lines.w, -1)[..., -lines.K:]


def write(target: Tensor, tile: Tensor, weights: Tensor, more: Tensor, lines: Lines, scale: float) -> None:
    """Writes tile + scale * weights more, of (A, w, d), (I * h, T, M) and (I * h, M, d), to (B, 1, N, h, d)."""
    tile = tile.view(lines.I * lines.h, lines.T, lines.d)
    if more.shape[1]:
        torch.baddbmm(tile, weights, more, alpha=scale, out=tile)
    lines.scatter_queries(target, tile)


def forward(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        scale: float,
        padding: Optional[Tensor],
        take: Take,
) -> Tensor:
    """(B, 1, N, h, d); arguments as of `ls_vision.ops.attention.attend`."""
    out = torch.empty(query.shape, dtype=query.dtype)
    for lines in parts(query, window, 0 if additional is None else additional.shape[1], take):
        tiles = gather(query, pair, additional, padding, lines, scale)
        tile = take('out', shape=(lines.A, lines.w, lines.d))
        torch.bmm(of_windows(tiles.p, lines), tiles.v, out=tile)
        write(out, tile, tiles.p[..., :-lines.K], tiles.v_more, lines, 1.)
    return out


def backward(
        grad_out: Tensor,
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        scale: float,
        padding: Optional[Tensor],
        take: Take,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, pair and additional keys and values, (B, 0, 2, h, d) without any."""
    (B, _, _, h, d), M = query.shape, 0 if additional is None else additional.shape[1]
    grad_q, grad_pair = (torch.empty(t.shape, dtype=t.dtype) for t in (query, pair))
    grad_additional = torch.zeros(B, M, 2, h, d, dtype=query.dtype)
    for lines in parts(query, window, M, take):
        tiles = gather(query, pair, additional, padding, lines, scale)
        (A, w, K), p = (lines.A, lines.w, lines.K), tiles.p
        do, q_window = lines.gather_queries('do', grad_out), tiles.q.view(A, w, d)
        dkv, dkv_more = take('dkv', shape=(2, A, K, d)), take('dkv more', shape=(2, *tiles.k_more.shape))
        dq, copy = take('dq', shape=(A, w, d)), take('copy', shape=(A, w, K))

        copy.copy_(of_windows(p, lines))  # products that transpose it are twice as fast on a copy
        torch.bmm(copy.transpose(1, 2), do.view(A, w, d), out=dkv[1])
        if M:
            torch.bmm(p[..., :M].transpose(1, 2), do, out=dkv_more[1])
        ds = join(*products(do, tiles.v, tiles.v_more, lines, 1.), lines, 'ds')
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)

        copy.copy_(of_windows(ds, lines))
        torch.baddbmm(dkv[0], copy.transpose(1, 2), q_window, beta=0., alpha=scale, out=dkv[0])
        torch.baddbmm(dq, copy, tiles.k, beta=0., alpha=scale, out=dq)
        write(grad_q, dq, ds[..., :M], tiles.k_more, lines, scale)
        lines.add_windows(grad_pair, dkv)
        if M:
            torch.baddbmm(dkv_more[0], ds[..., :M].transpose(1, 2), tiles.q, beta=0., alpha=scale, out=dkv_more[0])
            target = grad_additional[lines.images].permute(2, 0, 3, 1, 4)
            target.add_(dkv_more.unflatten(1, (lines.I, h)))
    return grad_q, grad_pair, grad_additional
