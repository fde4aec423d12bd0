"""Windows of a sequence, a grid of one row: products of views instead of gathered tiles.

The queries and the keys of a window lie in one line, so that a window is a matrix whose rows are tokens apart in memory
and a run of windows a batch of them, overlapping where it is read. Nothing is copied but logits, and the additional
keys meet all queries in one product instead of one for each window.

Shapes: h heads, d head width, M additional keys; in a chunk n windows of Q queries and K keys, J = M + K.
"""
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor

from ..numerics import masked_logit, statistics_dtype
from ..window import key_size

SHORTEST_RUN = 8  # windows; fewer are computed for all sequences and heads at once


def takes(query: Tensor, bias: Optional[Tensor], with_lse: bool, chunk: Any) -> bool:
    """True where the windows of a chunk are computed here."""
    return (
        query.is_cpu and query.dtype == statistics_dtype(query) and query.shape[1] == 1 and bias is None
        and not with_lse and chunk.shape[2] >= SHORTEST_RUN)


class Windows(NamedTuple):
    """Views of one sequence and head."""
    image: int
    """Number in the chunk."""
    head: int
    q: Tensor
    """(n, Q, d)."""
    k: Tensor
    """(n, K, d), overlapping, as is `v`."""
    v: Tensor
    k_more: Optional[Tensor]
    """(M, d) additional keys, None without any, as are `v_more`."""
    v_more: Optional[Tensor]
    masked: Optional[Tensor]
    """(n, 1, K), true where a key is padding."""


def windows(
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
) -> Iterator[Windows]:
    """The sequences and heads of a chunk, one by one."""
    queries, keys = chunk.queries(query), chunk.keys(pair)
    masked = None if padding is None else chunk.keys(padding)
    for image in range(chunk.shape[0]):
        for head in range(query.shape[3]):
            kv = keys[image, 0, :, 0, :, :, head]  # (n, K, 2, d)
            more = None if additional is None else additional[chunk.images.start + image, :, :, head]  # (M, 2, d)
            yield Windows(
                image, head, line(queries, image, head), kv[:, :, 0], kv[:, :, 1],
                None if more is None else more[:, 0], None if more is None else more[:, 1],
                None if masked is None else masked[image, 0, :, 0, None])


def line(view: Tensor, image: int, head: int) -> Tensor:
    """(n, tokens, ...) of one sequence and head of what a chunk's `queries` or `keys` gives of (B, 1, N, h, d)."""
    return view[image, 0, :, 0, :, head]


def weigh(part: Windows, scale: float, take: Callable[..., Tensor]) -> Tensor:
    """(n * Q, J) weights: of the additional keys, then of the window's."""
    (n, Q, _), K = part.q.shape, part.k.shape[1]
    M = 0 if part.k_more is None else part.k_more.shape[0]
    p, window = take('p', shape=(n * Q, M + K)), take('window', shape=(n, Q, K))
    torch.baddbmm(window, part.q, part.k.transpose(1, 2), beta=0., alpha=scale, out=window)
    if part.masked is not None:
        window.masked_fill_(part.masked, masked_logit(window.dtype))
    p[:, M:] = window.view(n * Q, K)
    if part.k_more is not None:
        more = p[:, :M]
        torch.addmm(more, part.q.flatten(0, 1), part.k_more.t(), beta=0., alpha=scale, out=more)
    return torch.softmax(p, dim=-1, out=p)


def forward(
        out: Tensor,
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
        scale: float,
        take: Callable[..., Tensor],
) -> None:
    """Writes the outputs of a chunk to `out`, (B, 1, N, h, d)."""
    target = chunk.queries(out)
    for part in windows(query, pair, additional, padding, chunk):
        (n, Q, d), K = part.q.shape, part.k.shape[1]
        p = weigh(part, scale, take)
        window, tile = take('window', shape=(n, Q, K)), take('out', shape=(n, Q, d))
        window.view(n * Q, K).copy_(p[:, -K:])
        torch.bmm(window, part.v, out=tile)
        write(line(target, part.image, part.head), tile, p[:, :-K], part.v_more, 1.)


def write(target: Tensor, tile: Tensor, weights: Tensor, more: Optional[Tensor], scale: float) -> None:
    """target = tile + scale * weights more, of (n, Q, d), the same, (n * Q, M) and (M, d)."""
    flat = target.flatten(0, 1)
    if more is None:
        flat.copy_(tile.flatten(0, 1))
    else:
        torch.addmm(tile.flatten(0, 1), weights, more, alpha=scale, out=flat)


def backward(
        grad_out: Tensor,
        query: Tensor,
        pair: Tensor,
        additional: Optional[Tensor],
        padding: Optional[Tensor],
        chunk: Any,
        scale: float,
        take: Callable[..., Tensor],
        grad_q: Tensor,
        grad_pair: Tensor,
        grad_additional: Tensor,
) -> None:
    """Writes a chunk's gradient of the queries and adds those of keys and values."""
    grads, target = chunk.queries(grad_out), chunk.queries(grad_q)
    stride = -(-key_size(chunk.window)[1] // chunk.window.cols)  # windows this far apart share no keys
    apart = [chunk.keys(grad_pair, (1, stride), 0, first) for first in range(min(stride, chunk.shape[2]))]
    for part in windows(query, pair, additional, padding, chunk):
        (n, Q, d), K = part.q.shape, part.k.shape[1]
        p, do = weigh(part, scale, take), line(grads, part.image, part.head)
        ds, window, dkv = take('ds', shape=p.shape), take('window', shape=(n, Q, K)), take('dkv', shape=(2, n, K, d))

        window.view(n * Q, K).copy_(p[:, -K:])
        torch.bmm(window.transpose(1, 2), do, out=dkv[1])
        torch.bmm(do, part.v.transpose(1, 2), out=window)
        ds[:, -K:] = window.view(n * Q, K)
        if part.v_more is not None:
            torch.mm(do.flatten(0, 1), part.v_more.t(), out=ds[:, :-K])
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)

        window.view(n * Q, K).copy_(ds[:, -K:])
        torch.baddbmm(dkv[0], window.transpose(1, 2), part.q, beta=0., alpha=scale, out=dkv[0])
        dq = take('dq', shape=(n, Q, d))
        torch.baddbmm(dq, window, part.k, beta=0., alpha=scale, out=dq)
        write(line(target, part.image, part.head), dq, ds[:, :-K], part.k_more, scale)
        for first, keys in enumerate(apart):
            keys[part.image, 0, :, 0, :, :, part.head].add_(dkv[:, first::stride].permute(1, 2, 0, 3))
        if part.k_more is not None:
            of_more = grad_additional[chunk.images.start + part.image, :, :, part.head]  # (M, 2, d)
            of_more[:, 0].addmm_(ds[:, :-K].t(), part.q.flatten(0, 1), alpha=scale)
            of_more[:, 1].addmm_(p[:, :-K].t(), do.flatten(0, 1))
