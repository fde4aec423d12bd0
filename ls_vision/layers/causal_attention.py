"""Causal long-short attention over a sequence (Zhu et al., NeurIPS 2021, arXiv 2107.02192).

Each token sees the w - 1 tokens before it and itself, and r summaries of every chunk of c tokens that ended before its
own chunk began.

Shapes: B batch, N tokens, C channels, h heads, d = C / h, w window size, c chunk size, r summaries of a chunk, G
chunks, S = G * r.
"""
import itertools
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..ops.attention import check_padding_mask
from ..ops.causal import CausalGeometry, causal_attention
from ..ops.long_range import merge_parts, summarize
from ..ops.numerics import at_least_float32, to_autocast, to_dtype
from . import cpu
from .causal_state import CausalState, RaggedState
from .checks import check_at_least, check_choice, check_heads, check_tokens
from .norm import DualLayerNorm
from .sequence_attention import keys_and_values
from .sinusoids import distance_vectors

SUMMARIES = ('uniform', 'released')

# a weighted mean of keys and values (B, h, r, 2 * d), and the log-sum-exp of its weights (B, h, r)
Part = Tuple[Tensor, Tensor]

_numbers = itertools.count()


class CausalLongShortAttention1d(nn.Module):
    """Causal attention to a sliding window and to summaries of the chunks before, in one softmax.

    A whole sequence, one segment after another and one token at a time give the same outputs. What is kept between
    calls, a `CausalState`, holds the last w - 1 tokens, r summaries of each finished chunk and a running softmax of the
    open one. The parameter names are those of the released implementation.
    """
    allows_gap = False
    """Whether a window may be smaller than a chunk, which hides some tokens of its chunk from a query."""

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            *,
            window_size: int = 512,
            chunk_size: int = 16,
            chunk_rank: int = 1,
            summaries: str = 'uniform',
            max_chunks: Optional[int] = None,
            bias: bool = False,
            clamp_len: int = -1,
            chunk_clamp_len: int = -1,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: C, channels of the tokens.
            num_heads: h.
            window_size: w, tokens that a token sees, itself included.
            chunk_size: c, tokens that are summarised together; at most w, or tokens would be seen by no path.
            chunk_rank: r, summaries per head of a chunk; 0 leaves the window alone.
            summaries: 'uniform' summarises all chunks alike, so that it makes no difference where a text is cut into
                calls; 'released' summarises those of earlier calls as the released code does those of its memory:
                tokens are pooled, then projected. Calls with a state must then be whole chunks.
            max_chunks: A token sees the summaries of the last so many chunks, so that a state stops growing; None for
                those of all chunks.
            bias: Add a bias to queries, keys, values and the output.
            clamp_len: Distances between tokens beyond this one are taken for it; -1 for no limit.
            chunk_clamp_len: The same for distances to summaries, counted in summaries.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        check_heads(dim, num_heads)
        if dim % 2:
            raise ValueError(f'dim is {dim}, the sinusoids of positions need an even number.')
        check_at_least(1, window_size=window_size, chunk_size=chunk_size)
        check_at_least(0, chunk_rank=chunk_rank)
        check_at_least(-1, clamp_len=clamp_len, chunk_clamp_len=chunk_clamp_len)
        check_choice('summaries', summaries, SUMMARIES)
        if max_chunks is not None:
            check_at_least(1, max_chunks=max_chunks)
        if window_size < chunk_size and chunk_rank > 0 and not self.allows_gap:
            raise ValueError(
                f'window_size {window_size} is smaller than chunk_size {chunk_size}: tokens of the open chunk that the '
                'window has left would be seen by no path.')
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.chunk_size = chunk_size
        self.chunk_rank = chunk_rank
        self.summaries = summaries
        self.max_chunks = max_chunks
        self.clamp_len = clamp_len
        self.chunk_clamp_len = chunk_clamp_len
        self.scale = (dim // num_heads) ** -0.5
        self._number = next(_numbers)

        self.proj_query, self.proj_key, self.proj_val = (nn.Linear(dim, dim, bias=bias, **dd) for _ in range(3))
        self.proj_out = nn.Linear(dim, dim, bias=bias, **dd)
        self.r_net = nn.Linear(dim, dim, bias=False, **dd)
        self.r_w_bias = nn.Parameter(torch.empty(1, num_heads, 1, 1, dim // num_heads, **dd))
        self.r_r_bias = nn.Parameter(torch.empty(1, num_heads, 1, dim // num_heads, **dd))
        self.dual_ln_win = DualLayerNorm(dim, **dd)
        self.dconv_1: Optional[nn.Linear] = None
        self.r_net_chunk: Optional[nn.Linear] = None
        self.dual_ln_dproj: Optional[nn.Module] = None
        if chunk_rank > 0:
            self.dconv_1 = nn.Linear(dim, num_heads * chunk_rank, **dd)
            self.r_net_chunk = nn.Linear(dim, dim, **dd)
            self.dual_ln_dproj = DualLayerNorm(dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the module's own parameters and its projections."""
        nn.init.zeros_(self.r_w_bias)
        nn.init.zeros_(self.r_r_bias)
        for linear in (self.proj_query, self.proj_key, self.proj_val, self.proj_out):
            nn.init.xavier_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = next(_numbers)  # a copy takes no states of the original

    def forward(
            self,
            x: Tensor,
            key_padding_mask: Optional[Tensor] = None,
            *,
            state: Any = ...,
    ) -> Union[Tensor, Tuple[Tensor, Union[CausalState, RaggedState]]]:
        """
        Args:
            x: (B, N, C), normalised; any N.
            key_padding_mask: (B, N) bool, True where a token is PADDING, anywhere in a row. The outputs are those of
                each row without its padding. With a state, rows are computed one after the other from then on.
            state: None at the start of a text, or what the call on the tokens before returned. Left out, nothing is
                kept.

        Returns:
            (B, N, C), with `state` a pair of that and the state after these tokens. Padding has the output bias.

        Raises:
            ValueError: A shape or the mask does not fit, or the state is that of another module, batch size or dtype.
        """
        check_tokens('x', x, self.dim)
        check_padding_mask(key_padding_mask, x, x.shape[:2])
        if state is ...:
            if key_padding_mask is None:
                return self._output(self._run(x, None, keep=False)[0])
            return self._forward_padded(x, key_padding_mask)
        x = to_autocast(x)
        self._check_state(state, x)
        if isinstance(state, RaggedState) or (key_padding_mask is not None and key_padding_mask.any()):
            return self._forward_ragged(x, key_padding_mask, state)
        self._check_whole_chunks(x.shape[1])
        out, new_state = self._run(x, state, keep=True)
        assert new_state is not None
        return self._output(out), new_state

    def _forward_padded(self, x: Tensor, padding: Tensor) -> Tensor:
        """Puts the tokens of each row before its padding, which they then can't see, and back."""
        order = padding.to(torch.uint8).argsort(dim=1, stable=True)  # (B, N)
        x = x.masked_fill(padding.unsqueeze(-1), 0.)  # whatever is there, NaN included
        out, _ = self._run(_rows(x, order), None, keep=False)
        out = _rows(out, order.argsort(dim=1))
        return self._output(out.masked_fill(padding.unsqueeze(-1), 0.))

    def _forward_ragged(
            self,
            x: Tensor,
            padding: Optional[Tensor],
            state: Union[CausalState, RaggedState, None],
    ) -> Tuple[Tensor, RaggedState]:
        """Row by row: their chunks begin and end at different places."""
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if padding is None else padding
        rows = [None] * x.shape[0] if state is None else state.rows()
        outputs, states = [], []
        for tokens, hidden, row in zip(x, padding, rows):
            place = (~hidden).nonzero().squeeze(1)
            self._check_whole_chunks(len(place))
            out, new_state = self._run(tokens[place].unsqueeze(0), row, keep=True)
            assert new_state is not None
            outputs.append(torch.zeros_like(tokens).index_copy(0, place, out[0]))
            states.append(new_state)
        out = torch.stack(outputs) if outputs else torch.zeros_like(x)
        return self._output(out), RaggedState(tuple(states))

    def _run(self, x: Tensor, state: Optional[CausalState], keep: bool) -> Tuple[Tensor, Optional[CausalState]]:
        """Attention (B, N, C) before the output projection, and the new state where one is to be kept."""
        x = to_autocast(x)
        query, raw, scores = self._project(x)
        pair = self._window_pair(raw)
        num_seen = 0 if state is None else state.num_tokens
        if state is not None:
            pair = torch.cat([state.pair, pair], dim=1)
        finished, open_part = self._pool(raw, scores, state, keep)
        known = pair.new_empty(x.shape[0], 0, *pair.shape[2:]) if state is None else state.summaries
        summaries = known if finished is None else torch.cat([known, finished], dim=1)
        out = self._attend(query, pair, summaries, self._start(known, num_seen))
        if not keep:
            return out, None
        if self.summaries == 'released' and scores is not None:
            summaries = torch.cat([known, self._remembered_summaries(x, scores)], dim=1)
        if self.max_chunks is not None:
            summaries = _last(summaries, self.max_chunks * self.chunk_rank)
        sums, lse = (None, None) if open_part is None else open_part
        recent = _last(pair, self.window_size - 1)
        return out, CausalState(num_seen + x.shape[1], recent, summaries, sums, lse, self._number)

    def _start(self, known: Tensor, num_seen: int) -> int:
        """Number of the first query, counted from the first chunk whose summaries (B, S, 2, h, d) are known."""
        if self.chunk_rank == 0:
            return num_seen
        dropped = num_seen // self.chunk_size - known.shape[1] // self.chunk_rank
        return num_seen - dropped * self.chunk_size

    def _project(self, x: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Queries (B, N, h, d), keys and values (B, N, 2, h, d), not normalised, and scores (B, N, h, r)."""
        h = self.num_heads
        q = cpu.linear(self.proj_query, x).unflatten(-1, (h, -1))
        kv = keys_and_values(self.proj_key, self.proj_val, x).unflatten(-1, (h, -1))
        scores = None if self.dconv_1 is None else cpu.linear(self.dconv_1, x).unflatten(-1, (h, self.chunk_rank))
        return q, kv, scores

    def _window_pair(self, raw: Tensor) -> Tensor:
        """Normalised keys and values (B, N, 2, h, d)."""
        return self.dual_ln_win(raw.flatten(3)).view_as(raw)

    def _pool(
            self,
            raw: Tensor,
            scores: Optional[Tensor],
            state: Optional[CausalState],
            keep: bool,
    ) -> Tuple[Optional[Tensor], Optional[Part]]:
        """Summaries (B, S, 2, h, d) of the chunks that these tokens finish, and the open chunk where one is to be kept.
        """
        if scores is None:
            return None, None
        c, N = self.chunk_size, raw.shape[1]
        if isinstance(N, torch.SymInt) and state is None and not keep:
            return self._normalise_summaries([_pool_open(scores, raw, c)], raw.dtype), None
        done: List[Tensor] = []  # (B, h, chunks, r, 2 * d)
        open_part: Optional[Part] = None
        first = 0
        if state is not None and state.open_sums is not None and state.open_lse is not None:
            open_part = (state.open_sums, state.open_lse)
            first = min(c - state.num_tokens % c, N)
            if first:
                open_part = merge_parts([open_part, _pool_part(scores[:, :first], raw[:, :first])])
            if state.num_tokens % c + first == c:
                done.append(open_part[0].unsqueeze(2))
                open_part = None
        whole = (N - first) // c * c
        if whole:
            stop = first + whole
            done.append(_pool_chunks(scores[:, first:stop], raw[:, first:stop], c))
        if keep and first + whole < N:
            open_part = _pool_part(scores[:, first + whole:], raw[:, first + whole:])
        return self._normalise_summaries(done, raw.dtype) if done else None, open_part

    def _normalise_summaries(self, sums: List[Tensor], dtype: torch.dtype) -> Tensor:
        """Weighted means (B, h, chunks, r, 2 * d) in order -> keys and values (B, S, 2, h, d)."""
        assert self.dual_ln_dproj is not None
        joined = torch.cat([to_dtype(t, dtype) for t in sums], dim=2)
        joined = joined.unflatten(-1, (2, -1)).permute(0, 2, 3, 4, 1, 5)  # (B, G, r, 2, h, d)
        joined = joined.flatten(1, 2).flatten(3)  # (B, S, 2, C)
        return self.dual_ln_dproj(joined).unflatten(-1, (self.num_heads, -1))

    def _remembered_summaries(self, x: Tensor, scores: Tensor) -> Tensor:
        """The released summaries (B, S, 2, h, d) of tokens of an earlier call: pooled, then projected."""
        assert self.dual_ln_dproj is not None
        h = self.num_heads
        tokens = x.unflatten(-1, (1, h, -1))  # (B, N, 1, h, d)
        pooled = _pool_chunks(scores, tokens, self.chunk_size)  # (B, h, G, r, d)
        pooled = pooled.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)  # (B, S, C)
        return self.dual_ln_dproj(keys_and_values(self.proj_key, self.proj_val, pooled)).unflatten(-1, (h, -1))

    def _attend(self, query: Tensor, pair: Tensor, summaries: Tensor, start: int) -> Tensor:
        """(B, N, C) of queries from number `start` on, with positions of the module's own."""
        positions = distance_vectors(self.r_net, self.window_size, self.clamp_len, query)
        if self.r_net_chunk is None:
            summary_positions = positions[:0]
        else:
            summary_positions = distance_vectors(self.r_net_chunk, summaries.shape[1], self.chunk_clamp_len, query)
        return self._attend_at(query, pair, summaries, start, positions, summary_positions)

    def _attend_at(
            self,
            query: Tensor,
            pair: Tensor,
            summaries: Tensor,
            start: int,
            positions: Tensor,
            summary_positions: Tensor,
    ) -> Tensor:
        """`_attend` with positional vectors (distances, C), farthest first."""
        heads = (self.num_heads, -1)
        drop = None if cpu.is_inactive_dropout(self.attn_drop) else self.attn_drop
        out = causal_attention(
            query, pair, summaries, positions.unflatten(-1, heads), summary_positions.unflatten(-1, heads),
            self.r_w_bias[0, :, 0, 0], self.r_r_bias[0, :, 0],
            CausalGeometry(self.window_size, self.chunk_size, self.chunk_rank, start, self.max_chunks or 0),
            self.scale, drop)
        return out.flatten(2)

    def _output(self, x: Tensor) -> Tensor:
        return self.proj_drop(cpu.linear(self.proj_out, x))

    def _check_state(self, state: Any, x: Tensor) -> None:
        if state is None:
            return
        if not isinstance(state, (CausalState, RaggedState)):
            raise ValueError(f'state is a {type(state).__name__}, expected None or the state of an earlier call.')
        rows = (state,) if isinstance(state, CausalState) else state.states
        batch = state.pair.shape[0] if isinstance(state, CausalState) else len(rows)
        if any(row.owner != self._number for row in rows):
            raise ValueError(
                'state is that of another module: each layer has one of its own, and a copy of a module starts with '
                'None.')
        if batch != x.shape[0]:
            raise ValueError(f'state has a batch of {batch}, x one of {x.shape[0]}; `state.reorder` picks rows.')
        for row in rows:
            if row.pair.dtype != x.dtype or row.pair.device != x.device:
                raise ValueError(
                    f'state is {row.pair.dtype} on {row.pair.device} and x {x.dtype} on {x.device}, expected the same.')

    def _check_whole_chunks(self, num_tokens: int) -> None:
        if self.summaries == 'released' and self.chunk_rank > 0 and num_tokens % self.chunk_size:
            raise ValueError(
                f"x has {num_tokens} tokens, with summaries='released' and a state expected a multiple of chunk_size "
                f"{self.chunk_size}; summaries='uniform' takes any number.")

    def extra_repr(self) -> str:
        return (
            f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, '
            f'chunk_size={self.chunk_size}, chunk_rank={self.chunk_rank}, summaries={self.summaries!r}, '
            f'max_chunks={self.max_chunks}')


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens or summaries of (B, N, ...), without keeping much more than them in memory."""
    last = x[:, max(x.shape[1] - count, 0):]
    return last.clone() if x.shape[1] > 2 * (count + 1) else last


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, C) with the tokens of each row in the order of a (B, N) index."""
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


def _pool_part(scores: Tensor, tokens: Tensor) -> Part:
    """The weighted mean of one part of a chunk, at least in float32: it will be added to.

    Args:
        scores: (B, n, h, r).
        tokens: (B, n, kinds, h, d).
    """
    sums, lse = summarize(at_least_float32(scores).permute(0, 2, 3, 1), at_least_float32(tokens), with_lse=True)
    return sums.flatten(3), lse


def _pool_chunks(scores: Tensor, tokens: Tensor, chunk_size: int) -> Tensor:
    """The weighted means of whole chunks, (B, h, G, r, kinds * d); arguments as in `_pool_part`."""
    B, num_chunks = scores.shape[0], scores.shape[1] // chunk_size
    scores = scores.unflatten(1, (num_chunks, chunk_size)).flatten(0, 1).permute(0, 2, 3, 1)  # (B * G, h, r, c)
    tokens = tokens.unflatten(1, (num_chunks, chunk_size)).flatten(0, 1)
    sums, _ = summarize(scores, tokens)  # (B * G, h, r, kinds, d)
    return sums.flatten(3).unflatten(0, (B, num_chunks)).transpose(1, 2)


def _pool_open(scores: Tensor, tokens: Tensor, chunk_size: int) -> Tensor:
    """`_pool_chunks` in a graph of open length: of all N // c chunks and of two more, which no query sees.

    With them every length has two chunks or more; tracers make a size of 0 or 1 a constant. Chunks are looked up and
    summed without a matrix product: exporters can't prove that 8 * (N // 8 + 2) tokens are N // 8 + 2 chunks.
    """
    N = scores.shape[1]
    first = torch.arange(N // chunk_size + 2, device=scores.device)[:, None] * chunk_size
    index = (first + torch.arange(chunk_size, device=scores.device)).clamp(max=N - 1)  # (G, c)
    weights = at_least_float32(scores)[:, index].softmax(dim=2)  # (B, G, c, h, r)
    tokens = at_least_float32(tokens)[:, index].transpose(3, 4)  # (B, G, c, h, kinds, d)
    sums = (weights[..., None, None] * tokens.unsqueeze(4)).sum(2)  # (B, G, h, r, kinds, d)
    return sums.flatten(4).transpose(1, 2)
