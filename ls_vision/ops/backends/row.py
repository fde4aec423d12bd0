"""Windows of a sequence, a grid of one row: keys and values are gathered once, and windows are overlapping views.

The tiles of `blocked` hold a key once for each window that sees it, and the additional keys once for every window. In a
row, windows of gathered keys are views, and all queries of a sequence and head meet the additional keys in one product.

Shapes: h heads, d head width, M additional keys; in a chunk n windows of Q queries and K keys, J = M + K, and R keys of
all windows together.
"""
from typing import Any, Callable, Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..numerics import masked_logit, statistics_dtype
from ..window import key_size

SHORTEST_RUN = 8  # windows; fewer are computed for all sequences and heads at once

Take = Callable[..., Tensor]


def takes(query: Tensor, bias: Optional[Tensor]) -> bool:
    """True where runs of windows are computed here."""
    return query.is_cpu and query.dtype == statistics_dtype(query) and query.shape[1] == 1 and bias is None


class Part(NamedTuple):
    """One sequence and head of a chunk."""
    image: int
    head: int
    q: Tensor
    """(n * Q, d)."""
    k: Tensor
    """(n, K, d), overlapping, as is `v`."""
    v: Tensor
    k_more: Optional[Tensor]
    """(M, d) additional keys, None without any, as are `v_more`."""
    v_more: Optional[Tensor]
    masked: Optional[Tensor]
    """(n, 1, K), true where a key is padding."""

    @property
    def shape(self) -> Tuple[int, int, int, int]:
        """(n, Q, K, d)."""
        n, K, d = self.k.shape
        return n, self.q.shape[0] // n, K, d


def parts(
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
        take: Take,
) -> Iterator[Part]:
    """The sequences and heads of a chunk, one by one, in tiles that the next one reuses."""
    (B, _, n), K, (h, d) = chunk.shape, chunk.num_keys, query.shape[3:]
    queries, keys = chunk.queries(query), key_rows(pair, chunk)
    masked = None if padding is None else chunk.keys(padding)
    q, kv = take('q', shape=(n * chunk.num_queries, d)), take('kv', shape=(2, keys.shape[1], d))
    k, v = (windows(rows, n, K, chunk.window.cols) for rows in kv)
    for image in range(B):
        for head in range(h):
            q.copy_(queries[image, 0, :, 0, :, head].flatten(0, 1))
            for kind in range(2):
                kv[kind].copy_(keys[image, :, kind, head])
            more = None if additional is None else additional[chunk.images.start + image, :, :, head]  # (M, 2, d)
            yield Part(
                image, head, q, k, v, None if more is None else more[:, 0], None if more is None else more[:, 1],
                None if masked is None else masked[image, 0, :, 0, None])


def key_rows(pair: Tensor, chunk: Any) -> Tensor:
    """View (images, R, 2, h, d) of a raster (B, 1, N, 2, h, d): the keys of all windows of a chunk."""
    view = chunk.keys(pair)[:, 0, :, 0]  # (images, n, K, 2, h, d)
    R = (view.shape[1] - 1) * chunk.window.cols + view.shape[2]
    strides = view.stride()
    return view.as_strided((view.shape[0], R, *view.shape[3:]), (strides[0], *strides[2:]), view.storage_offset())


def windows(rows: Tensor, n: int, K: int, step: int) -> Tensor:
    """Overlapping view (n, K, d) of contiguous (R, d), a window every `step` tokens."""
    d = rows.shape[1]
    return rows.as_strided((n, K, d), (step * d, d, 1), rows.storage_offset())


def weigh(part: Part, scale: float, take: Take) -> Tensor:
    """(n * Q, J) weights: of the additional keys, then of the window's."""
    n, Q, K, d = part.shape
    M = 0 if part.k_more is None else part.k_more.shape[0]
    p, window = take('p', shape=(n * Q, M + K)), take('window', shape=(n, Q, K))
    torch.baddbmm(window, part.q.view(n, Q, d), part.k.transpose(1, 2), beta=0., alpha=scale, out=window)
    if part.masked is not None:
        window.masked_fill_(part.masked, masked_logit(window.dtype))
    p[:, M:] = window.view(n * Q, K)
    if part.k_more is not None:
        more = p[:, :M]
        torch.addmm(more, part.q, part.k_more.t(), beta=0., alpha=scale, out=more)
    return torch.softmax(p, dim=-1, out=p)


def write(target: Tensor, tile: Tensor, weights: Tensor, more: Optional[Tensor], scale: float) -> None:
    """target = tile + scale * weights more, of (n, Q, d), (n * Q, d), (n * Q, M) and (M, d)."""
    flat = target.flatten(0, 1)
    if more is None:
        flat.copy_(tile)
    else:
        torch.addmm(tile, weights, more, alpha=scale, out=flat)


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
    target = chunk.queries(out)
    for part in parts(query, pair, additional, padding, chunk, take):
        n, Q, K, d = part.shape
        p = weigh(part, scale, take)
        window, tile = take('window', shape=(n, Q, K)), take('out', shape=(n, Q, d))
        window.view(n * Q, K).copy_(p[:, -K:])
        torch.bmm(window, part.v, out=tile)
        write(target[part.image, 0, :, 0, :, part.head], tile.view(n * Q, d), p[:, :-K], part.v_more, 1.)


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
    grads, target, keys = chunk.queries(grad_out), chunk.queries(grad_q), key_rows(grad_pair, chunk)
    for part in parts(query, pair, additional, padding, chunk, take):
        n, Q, K, d = part.shape
        p, q = weigh(part, scale, take), part.q.view(n, Q, d)
        ds, window, do = take('ds', shape=p.shape), take('window', shape=(n, Q, K)), take('do', shape=(n * Q, d))
        do.copy_(grads[part.image, 0, :, 0, :, part.head].flatten(0, 1))
        dkv = take('dkv', shape=(2, n, K, d))

        window.view(n * Q, K).copy_(p[:, -K:])
        torch.bmm(window.transpose(1, 2), do.view(n, Q, d), out=dkv[1])
        torch.bmm(do.view(n, Q, d), part.v.transpose(1, 2), out=window)
        ds[:, -K:] = window.view(n * Q, K)
        if part.v_more is not None:
            torch.mm(do, part.v_more.t(), out=ds[:, :-K])
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)

        window.view(n * Q, K).copy_(ds[:, -K:])
        torch.baddbmm(dkv[0], window.transpose(1, 2), q, beta=0., alpha=scale, out=dkv[0])
        dq = take('dq', shape=(n, Q, d))
        torch.baddbmm(dq, window, part.k, beta=0., alpha=scale, out=dq)
        write(target[part.image, 0, :, 0, :, part.head], dq.view(n * Q, d), ds[:, :-K], part.k_more, scale)
        add_windows(keys[part.image, :, :, part.head], dkv, chunk, take)
        if part.k_more is not None:
            of_more = grad_additional[chunk.images.start + part.image, :, :, part.head]  # (M, 2, d)
            of_more[:, 0].addmm_(ds[:, :-K].t(), part.q, alpha=scale)
            of_more[:, 1].addmm_(p[:, :-K].t(), do)


def add_windows(target: Tensor, tiles: Tensor, chunk: Any, take: Take) -> None:
    """Adds the tiles (2, n, K, d) of a chunk's windows to (R, 2, d)."""
    (_, n, K, d), step = tiles.shape, chunk.window.cols
    stride = -(-key_size(chunk.window)[1] // step)  # windows this far apart share no keys
    total = take('total', shape=(target.shape[0], d))
    for kind in range(2):
        total.zero_()
        for first in range(min(stride, n)):
            tile = tiles[kind, first::stride]
            windows(total[first * step:], tile.shape[0], K, stride * step).add_(tile)
        target[:, kind].add_(total)
