"""What causal long-short attention keeps of the tokens it has seen.

Shapes: B batch, C channels, h heads, d = C / h, w window size, r summaries of a chunk, S summaries of all finished
chunks.
"""
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor

from .checks import describe


@dataclass(frozen=True)
class CausalState:
    """The memory of a `CausalLongShortAttention1d`: it goes in with the next tokens and a new one comes out.

    A state is never changed, so that several continuations can start from it.
    """
    num_tokens: int
    """Tokens seen."""
    pair: Tensor
    """(B, up to w - 1, 2, h, d), normalised keys and values of the last tokens."""
    summaries: Tensor
    """(B, S, 2, h, d), keys and values of the finished chunks."""
    open_sums: Optional[Tensor]
    """(B, h, r, 2 * d), weighted means of the open chunk's keys and values; None where no chunk is open."""
    open_lse: Optional[Tensor]
    """(B, h, r), the log-sum-exp of the weights behind them."""
    owner: int
    """Number of the module that made the state."""

    def reorder(self, index: Tensor) -> 'CausalState':
        """The state of other rows of the batch, as beam search needs it: row i becomes row index[i].

        Args:
            index: (B',) of integers; rows may be left out or repeated.

        Raises:
            ValueError: The index is not one row of integers.
        """
        _check_index(index, self.pair.shape[0])
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    def detach(self) -> 'CausalState':
        """The same state without its graph, for truncated backpropagation through time."""
        return self._map(lambda t: t.detach())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.pair, self.summaries, self.open_sums, self.open_lse) if t is not None)

    def rows(self) -> Tuple['CausalState', ...]:
        """A state of its own for each row of the batch."""
        return tuple(self._map(itemgetter(slice(i, i + 1))) for i in range(self.pair.shape[0]))

    def _map(self, function: Callable[[Tensor], Tensor]) -> 'CausalState':
        changes: Any = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changes)


@dataclass(frozen=True)
class RaggedState:
    """The states of texts of different lengths, which came with a padding mask; used as `CausalState` is."""
    states: Tuple[CausalState, ...]
    """One of a batch of 1 for each row."""

    @property
    def num_tokens(self) -> List[int]:
        """Tokens seen, of each row."""
        return [state.num_tokens for state in self.states]

    def rows(self) -> Tuple[CausalState, ...]:
        """A state of its own for each row of the batch."""
        return self.states

    def reorder(self, index: Tensor) -> 'RaggedState':
        """As `CausalState.reorder`."""
        _check_index(index, len(self.states))
        return RaggedState(tuple(self.states[i] for i in index.tolist()))

    def detach(self) -> 'RaggedState':
        """As `CausalState.detach`."""
        return RaggedState(tuple(state.detach() for state in self.states))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(state.num_bytes for state in self.states)


def _check_index(index: Any, batch: int) -> None:
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f'index is {describe(index)}, expected a tensor of integers (batch,).')
    wrong = index[(index < 0) | (index >= batch)]
    if wrong.numel():
        raise ValueError(f'index has {wrong[0].item()}, expected rows 0 to {batch - 1} of the batch.')
