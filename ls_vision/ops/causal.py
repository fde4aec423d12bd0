"""Causal long-short attention over a sequence: a window that slides with the query, and summaries of finished chunks.

Tokens are numbered 0, 1, ... from the start of the text, of which a call may see a part. Query t sees the tokens
t - w < j <= t and the summaries of all chunks that ended before its own chunk began. Positions enter as in
Transformer-XL: by a vector for each distance, which is multiplied with the query.

The operator never holds more than the logits of a block of queries, forward or backward. The matrix of a block's
positional logits becomes a band by its strides: each row of logits starts one column later than the one above.

Shapes: B batch, M queries, L tokens before them, h heads, d head width, w window size, c chunk size, r summaries of a
chunk, S summaries; in a block b queries of U chunks, F = w - 1 + b keys and J = S + F logits each, I images.
"""
import functools
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import double_backward
from .backends.blocked import _buffers
from .calls import is_followed
from .chunks import slices
from .numerics import statistics_dtype, to_dtype

BLOCK_QUERIES = 64  # of a block, or one chunk where that is larger: more keys are outside of the window in larger ones
BLOCK_LOGITS = 2 ** 20  # logits held at a time, 4 MB in float32, where a block of one sequence has no more


class CausalGeometry(NamedTuple):
    """Who sees whom."""
    window_size: int
    """w, tokens that a query sees, itself included."""
    chunk_size: int
    """c, tokens of a chunk."""
    rank: int
    """r, summaries of a chunk."""
    start: int
    """Number of the first query."""
    max_chunks: int = 0
    """Chunks before its own whose summaries a query sees, the nearest ones; 0 for all."""

    def num_hidden(self, query: int) -> int:
        """Summaries that are too old for a query, by its number among those of the call."""
        if self.max_chunks == 0:
            return 0
        return max((self.start + query) // self.chunk_size - self.max_chunks, 0) * self.rank

    def num_visible(self, last_query: int) -> int:
        """Summaries that exist for a query, by its number among those of the call."""
        return max(self.start + last_query, 0) // self.chunk_size * self.rank  # a call may have no query


def causal_attention(
        query: Tensor,
        pair: Tensor,
        summaries: Tensor,
        positions: Tensor,
        summary_positions: Tensor,
        key_bias: Tensor,
        position_bias: Tensor,
        geometry: CausalGeometry,
        scale: float,
        drop: Optional[Callable[[Tensor], Tensor]] = None,
        backend: Optional[str] = None,
) -> Tensor:
    """softmax([(q + u) k + (q + v) R | q k_s + q R_s]) [values | summarised values], q scaled.

    Args:
        query: (B, M, h, d).
        pair: (B, L + M, 2, h, d), keys and values of the tokens before the queries and of their own. More than the
            last w - 1 of the former make no difference.
        summaries: (B, S, 2, h, d), keys and values that summarise the chunks from token 0 on, r of each; at least
            those that the last query sees.
        positions: (w, h, d), R for the distances w - 1 .. 0.
        summary_positions: (S or more, h, d), R_s for the distances ..., 1, 0 counted in summaries, 0 being the last one
            of the chunk before the query's.
        key_bias: (h, d), u.
        position_bias: (h, d), v.
        geometry: Who sees whom.
        scale: Factor on the query.
        drop: Dropout of the attention weights, which are then all held; None for none.
        backend: 'reference' (dense) or 'blocked' (lean); by default the former where somebody follows the operations.

    Returns:
        (B, M, h, d) in the dtype of the query.
    """
    tensors = (query, pair, summaries, positions, summary_positions, key_bias, position_bias)
    if backend == 'reference' or drop is not None or (backend is None and is_followed(*tensors)):
        return dense_causal_attention(*tensors, geometry, scale, drop)
    return torch.ops.ls_vision.causal_attention(*tensors, geometry, scale)


def dense_causal_attention(
        query: Tensor,
        pair: Tensor,
        summaries: Tensor,
        positions: Tensor,
        summary_positions: Tensor,
        key_bias: Tensor,
        position_bias: Tensor,
        geometry: CausalGeometry,
        scale: float,
        drop: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """`causal_attention` as plain operations: every query against every key, most of them masked."""
    (w, c, r, start, max_chunks), M = geometry, query.shape[1]
    statistics = statistics_dtype(query)
    q = query.to(statistics).transpose(1, 2) * scale  # (B, h, M, d)
    k, v = pair.to(statistics).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, L + M, d)
    # where the length is open, all of them: those that no query sees are masked
    S = summaries.shape[1] if isinstance(M, torch.SymInt) else geometry.num_visible(M - 1)
    k_s, v_s = summaries[:, :S].to(statistics).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, S, d)
    u, v_bias = (t.to(statistics)[None, :, None] for t in (key_bias, position_bias))
    by_distance, by_summary = (  # (h, d, distances)
        t.to(statistics).permute(1, 2, 0) for t in (positions, summary_positions[summary_positions.shape[0] - S:]))

    token = torch.arange(start, start + M, device=query.device)
    distance = token[:, None] - torch.arange(
        start + M - pair.shape[1], start + M, device=query.device)  # (M, L + M)
    number = torch.arange(S, device=query.device)
    from_summary = (token // c * r)[:, None] - 1 - number  # (M, S)

    window = (q + u) @ k.transpose(-2, -1) + _look_up((q + v_bias) @ by_distance, w - 1 - distance.clamp(0, w - 1))
    window = window.masked_fill((distance < 0) | (distance >= w), float('-inf'))
    chunks = q @ k_s.transpose(-2, -1) + _look_up(q @ by_summary, S - 1 - from_summary.clamp(min=0))
    hidden = from_summary < 0
    if max_chunks:
        hidden = hidden | (from_summary >= max_chunks * r)
    chunks = chunks.masked_fill(hidden, float('-inf'))
    weights = torch.cat([chunks, window], dim=-1).softmax(dim=-1)
    weights = weights if drop is None else drop(weights)
    return (weights @ torch.cat([v_s, v], dim=2)).transpose(1, 2).to(query.dtype)


def _look_up(x: Tensor, index: Tensor) -> Tensor:
    """(B, h, M, distances) and (M, keys) -> (B, h, M, keys)."""
    return x.gather(-1, index.expand(*x.shape[:2], -1, -1))


# ---- block by block --------------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """Consecutive queries that are computed at once: whole chunks, or a part of one chunk."""
    start: int
    size: int
    rows: int
    """Queries of one chunk."""


def causal_pieces(num_queries: int, geometry: CausalGeometry) -> List[Piece]:
    """All queries in order: the rest of the chunk in which they begin, whole chunks, a part of the last one."""
    c = geometry.chunk_size
    position = min(-geometry.start % c, num_queries)
    pieces = [Piece(0, position, position)] if position else []
    whole = (num_queries - position) // c * c
    pieces += [
        Piece(position + part.start, part.stop - part.start, c)
        for part in slices(whole, max(BLOCK_QUERIES // c, 1) * c)]
    position += whole
    if position < num_queries:
        pieces.append(Piece(position, num_queries - position, num_queries - position))
    return pieces


class Block:
    """One piece of some sequences: where its keys are, and its tiles."""

    def __init__(self, piece: Piece, images: slice, geometry: CausalGeometry, query: Tensor, pair: Tensor):
        w, r, self.geometry = geometry.window_size, geometry.rank, geometry
        self.images, self.rows = images, slice(piece.start, piece.start + piece.size)
        self.b, self.U = piece.size, piece.size // piece.rows
        self.chunk_rows, self.r, self.w = piece.rows, r, w
        self.summaries = slice(
            geometry.num_hidden(piece.start), geometry.num_visible(piece.start + piece.size - 1))
        self.S = self.summaries.stop - self.summaries.start
        self.F = w - 1 + self.b
        stop = pair.shape[1] - query.shape[1] + piece.start + piece.size
        self.keys = slice(max(stop - self.F, 0), stop)
        self.first_key = self.S + self.F - (stop - self.keys.start)  # column of the first key that exists
        self.J = self.S + self.F
        self.I, (self.h, self.d) = images.stop - images.start, query.shape[2:]
        self.take = functools.partial(_buffers.take, like=query, dtype=statistics_dtype(query))

    def tile(self, kind: str, tokens: Tensor) -> Tensor:
        """(I, n, h, d) -> contiguous (h * I, n, d)."""
        tile = self.take(kind, shape=(self.h, self.I, tokens.shape[1], self.d))
        tile.copy_(tokens.permute(2, 0, 1, 3))
        return tile.flatten(0, 1)

    def tiles(self, kind: str, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        """Keys and values (I, n, 2, h, d) -> (h * I, n, d) each; views of a single sequence's."""
        keys, values = tokens.unbind(2)
        if self.I == 1 and tokens.dtype == statistics_dtype(tokens):
            return keys[0].transpose(0, 1), values[0].transpose(0, 1)
        return self.tile(kind + ' keys', keys), self.tile(kind + ' values', values)

    def raster(self, tile: Tensor) -> Tensor:
        """View of a tile, back to (I, n, h, d)."""
        return tile.unflatten(0, (self.h, self.I)).permute(1, 2, 0, 3)

    def by_head(self, tile: Tensor) -> Tensor:
        """(h * I, b, x) -> (h, I * b, x)."""
        return tile.view(self.h, self.I * self.b, -1)

    def band(self, logits: Tensor) -> Tensor:
        """View (h * I, b, w) of contiguous logits (h * I, b, J): those of the distances w - 1 .. 0 of each query."""
        return logits.as_strided((self.h * self.I, self.b, self.w), (self.b * self.J, self.J + 1, 1),
                                 logits.storage_offset() + self.S)

    def steps(self, positional: Tensor) -> Tensor:
        """View (h * I, U, rows, S) of contiguous (h * I, b, S + (U - 1) * r) logits by distance.

        Each chunk of queries is r summaries farther from the first summary than the chunk before.
        """
        width = self.S + (self.U - 1) * self.r
        return positional.as_strided(
            (self.h * self.I, self.U, self.chunk_rows, self.S),
            (self.b * width, self.chunk_rows * width - self.r, width, 1),
            positional.storage_offset() + (self.U - 1) * self.r)

    def hide_summaries(self, logits: Tensor) -> None:
        """Masks the summaries of chunks that are not finished before a query's own begins, or too old for it."""
        late = (self.U - 1) * self.r
        if late:
            step = torch.arange(self.U, device=logits.device)[:, None, None] * self.r
            hidden = torch.arange(late, device=logits.device) >= step  # (U, 1, late)
            by_chunk = logits.view(-1, self.U, self.chunk_rows, self.J)
            by_chunk[..., self.S - late:self.S].masked_fill_(hidden, float('-inf'))
            for chunk in range(1, self.U if self.geometry.max_chunks else 1):
                old = self.geometry.num_hidden(self.rows.start + chunk * self.chunk_rows) - self.summaries.start
                by_chunk[:, chunk, :, :old] = float('-inf')


class Positions(NamedTuple):
    """Positional vectors and biases, head by head, in the precision of the statistics."""
    window: Tensor
    """(h, w, d), farthest first."""
    summaries: Tensor
    """(h, S + slack, d), farthest first, then zeros for queries of more chunks than one."""
    num_summaries: int
    key_bias: Tensor
    """(h, 1, d), as is `position_bias`."""
    position_bias: Tensor

    def of_summaries(self, block: Block) -> Tensor:
        """(h, S + (U - 1) * r, d) of a block's S, which are the last ones."""
        return self.summaries[:, self.num_summaries - block.S:self.num_summaries + (block.U - 1) * block.r]


def _prepare_positions(
        query: Tensor,
        positions: Tensor,
        summary_positions: Tensor,
        key_bias: Tensor,
        position_bias: Tensor,
        geometry: CausalGeometry,
) -> Positions:
    dtype = statistics_dtype(query)
    S = geometry.num_visible(query.shape[1] - 1)
    chunks = max((piece.size // piece.rows for piece in causal_pieces(query.shape[1], geometry)), default=1)
    slack = (chunks - 1) * geometry.rank
    of_summaries = summary_positions[summary_positions.shape[0] - S:].to(dtype).transpose(0, 1)
    if slack:
        of_summaries = F.pad(of_summaries, (0, 0, 0, slack))
    return Positions(
        positions.to(dtype).transpose(0, 1), of_summaries, S, key_bias.to(dtype).unsqueeze(1),
        position_bias.to(dtype).unsqueeze(1))


def _blocks(query: Tensor, pair: Tensor, geometry: CausalGeometry) -> List[Block]:
    """All blocks, the largest first, so that the memory for tiles is taken once."""
    blocks = []
    B, M, h, _ = query.shape
    for piece in reversed(causal_pieces(M, geometry)):
        seen = geometry.num_visible(piece.start + piece.size - 1) - geometry.num_hidden(piece.start)
        width = seen + geometry.window_size + piece.size
        images = max(BLOCK_LOGITS // (h * piece.size * width), 1)
        blocks += [Block(piece, part, geometry, query, pair) for part in slices(B, images)]
    return blocks


class Tiles(NamedTuple):
    """What a block multiplies, (h * I, n, d) each, and its weights (h * I, b, J)."""
    q: Tensor
    q_key: Tensor
    q_position: Tensor
    k: Tensor
    v: Tensor
    k_summary: Tensor
    v_summary: Tensor
    weights: Tensor


def _fill_tiles(block: Block, query: Tensor, pair: Tensor, summaries: Tensor, at: Positions, scale: float) -> Tiles:
    """Gathers a block's queries and keys and computes its weights."""
    S, first = block.S, block.first_key
    q = block.tile('q', query[block.images, block.rows]).mul_(scale)
    q_key, q_position = (
        torch.add(block.by_head(q), bias, out=block.take(kind, shape=(block.h, block.I * block.b, block.d)))
        for kind, bias in (('q key', at.key_bias), ('q position', at.position_bias)))
    k, v = block.tiles('window', pair[block.images, block.keys])
    k_summary, v_summary = block.tiles('summary', summaries[block.images, block.summaries])

    p = block.take('p', shape=(block.h * block.I, block.b, block.J)).fill_(float('-inf'))
    band = _product(block, 'band', q_position, at.window.transpose(1, 2))  # (h, I * b, w)
    block.band(p).copy_(band.view(-1, block.b, block.w))
    p[..., S:first] = float('-inf')  # before the first token
    p[..., first:].add_(_product(block, 'dots', q_key.view_as(q), k.transpose(1, 2)))
    if S:
        dots = _product(block, 'dots', q, k_summary.transpose(1, 2)).view(-1, block.U, block.chunk_rows, S)
        steps = _product(block, 'steps', block.by_head(q), at.of_summaries(block).transpose(1, 2))
        torch.add(dots, block.steps(steps), out=p.view(-1, block.U, block.chunk_rows, block.J)[..., :S])
        block.hide_summaries(p)
    torch.softmax(p, dim=-1, out=p)
    return Tiles(q, q_key.view_as(q), q_position.view_as(q), k, v, k_summary, v_summary, p)


def _product(block: Block, kind: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b, out=block.take(kind, shape=(a.shape[0], a.shape[1], b.shape[2])))


@torch.library.custom_op('ls_vision::causal_attention', mutates_args=())
def _attention(
        query: Tensor,
        pair: Tensor,
        summaries: Tensor,
        positions: Tensor,
        summary_positions: Tensor,
        key_bias: Tensor,
        position_bias: Tensor,
        geometry: List[int],
        scale: float,
) -> Tensor:
    shape = CausalGeometry(*geometry)
    at = _prepare_positions(query, positions, summary_positions, key_bias, position_bias, shape)
    out = query.new_empty(query.shape)
    for block in _blocks(query, pair, shape):
        tiles = _fill_tiles(block, query, pair, summaries, at, scale)
        tile = _product(block, 'out', tiles.weights[..., block.first_key:], tiles.v)
        if block.S:
            torch.baddbmm(tile, tiles.weights[..., :block.S], tiles.v_summary, out=tile)
        out[block.images, block.rows] = block.raster(tile).to(out.dtype)
    return out


@_attention.register_fake
def _(query, pair, summaries, positions, summary_positions, key_bias, position_bias, geometry, scale):
    return query.new_empty(query.shape)


@torch.library.custom_op('ls_vision::causal_attention_backward', mutates_args=())
def _attention_backward(
        grad: Tensor,
        query: Tensor,
        pair: Tensor,
        summaries: Tensor,
        positions: Tensor,
        summary_positions: Tensor,
        key_bias: Tensor,
        position_bias: Tensor,
        geometry: List[int],
        scale: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all tensors but the first."""
    shape, dtype = CausalGeometry(*geometry), statistics_dtype(query)
    at = _prepare_positions(query, positions, summary_positions, key_bias, position_bias, shape)
    grad_q = query.new_empty(query.shape)
    grad_pair, grad_summaries = (torch.zeros_like(t, dtype=dtype) for t in (pair, summaries))
    grad_at = Positions(
        torch.zeros_like(at.window), torch.zeros_like(at.summaries), at.num_summaries,
        torch.zeros_like(at.key_bias), torch.zeros_like(at.position_bias))
    for block in _blocks(query, pair, shape):
        tiles = _fill_tiles(block, query, pair, summaries, at, scale)
        ds = _differentiate_weights(block, tiles, block.tile('do', grad[block.images, block.rows]),
                                    grad_pair, grad_summaries)
        dq = _differentiate_logits(block, tiles, ds, at, grad_at, grad_pair, grad_summaries)
        grad_q[block.images, block.rows] = block.raster(dq.mul_(scale)).to(grad_q.dtype)
    grad_summary_positions = torch.zeros_like(summary_positions)
    S = at.num_summaries
    target = grad_summary_positions[len(grad_summary_positions) - S:]
    target.copy_(grad_at.summaries[:, :S].transpose(0, 1))
    return (
        grad_q, to_dtype(grad_pair, pair.dtype), to_dtype(grad_summaries, summaries.dtype),
        grad_at.window.transpose(0, 1).to(positions.dtype, copy=True), grad_summary_positions,
        grad_at.key_bias.squeeze(1).to(key_bias.dtype), grad_at.position_bias.squeeze(1).to(position_bias.dtype))


def _differentiate_weights(
        block: Block,
        tiles: Tiles,
        do: Tensor,
        grad_pair: Tensor,
        grad_summaries: Tensor,
) -> Tensor:
    """Gradient of the logits (h * I, b, J); adds those of the values."""
    p, S, first = tiles.weights, block.S, block.first_key
    ds = block.take('ds', shape=p.shape)
    ds[..., S:first] = 0.
    ds[..., first:] = _product(block, 'dots', do, tiles.v.transpose(1, 2))
    dv = _product(block, 'dv', p[..., first:].transpose(1, 2), do)
    grad_pair[block.images, block.keys, 1].add_(block.raster(dv))
    if S:
        ds[..., :S] = _product(block, 'dots', do, tiles.v_summary.transpose(1, 2))
        dv = _product(block, 'dv', p[..., :S].transpose(1, 2), do)
        grad_summaries[block.images, block.summaries, 1].add_(block.raster(dv))
    return torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)


def _differentiate_logits(
        block: Block,
        tiles: Tiles,
        ds: Tensor,
        at: Positions,
        grad_at: Positions,
        grad_pair: Tensor,
        grad_summaries: Tensor,
) -> Tensor:
    """Gradient of the scaled queries (h * I, b, d); adds those of keys, positions and biases."""
    S, q = block.S, tiles.q
    content = ds[..., block.first_key:]
    dq = _product(block, 'dq', content, tiles.k)
    grad_at.key_bias.add_(block.by_head(dq).sum(1, keepdim=True))
    dk = _product(block, 'dk', content.transpose(1, 2), tiles.q_key)
    grad_pair[block.images, block.keys, 0].add_(block.raster(dk))

    band = block.take('band', shape=(block.h, block.I * block.b, block.w))
    band.view(-1, block.b, block.w).copy_(block.band(ds))
    dq_position = _product(block, 'dq position', band, at.window)
    grad_at.position_bias.add_(dq_position.sum(1, keepdim=True))
    grad_at.window.baddbmm_(band.transpose(1, 2), block.by_head(tiles.q_position))
    dq.add_(dq_position.view_as(dq))
    if S:
        torch.baddbmm(dq, ds[..., :S], tiles.k_summary, out=dq)
        dk = _product(block, 'dk', ds[..., :S].transpose(1, 2), q)
        grad_summaries[block.images, block.summaries, 0].add_(block.raster(dk))
        vectors = at.of_summaries(block)
        steps = block.take('steps', shape=(block.h, block.I * block.b, vectors.shape[1])).zero_()
        block.steps(steps).copy_(ds[..., :S].view(-1, block.U, block.chunk_rows, S))
        by_head = block.by_head(dq)
        torch.baddbmm(by_head, steps, vectors, out=by_head)
        grad_at.of_summaries(block).baddbmm_(steps.transpose(1, 2), block.by_head(q))
    return dq


@_attention_backward.register_fake
def _(grad, *inputs):
    return tuple(t.new_empty(t.shape) for t in inputs[:7])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, geometry, ctx.scale = inputs
    ctx.geometry = tuple(geometry)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor):
    if torch.is_grad_enabled():  # create_graph=True
        def function(*tensors):
            return dense_causal_attention(*tensors, CausalGeometry(*ctx.geometry), ctx.scale)
        return (*double_backward.gradients(function, ctx.saved_tensors, (grad,)), None, None)
    return (*torch.ops.ls_vision.causal_attention_backward(grad, *ctx.saved_tensors, ctx.geometry, ctx.scale),
            None, None)


_attention.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.ls_vision.causal_attention)
def _forward_flops(query, pair, summaries, positions, summary_positions, key_bias, position_bias, geometry, *args,
                   **kwargs) -> int:
    """2 per multiply-add: content, positions and values of w tokens and of the summaries that each query sees."""
    (B, M, h, d), shape = query, CausalGeometry(*geometry)
    seen = sum(shape.num_visible(i) - shape.num_hidden(i) for i in range(M))
    return 2 * 3 * B * h * d * (M * shape.window_size + seen)


@register_flop_formula(torch.ops.ls_vision.causal_attention_backward)
def _backward_flops(grad, *args, **kwargs) -> int:
    return 3 * _forward_flops(*args, **kwargs)
