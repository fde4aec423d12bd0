"""What causal long-short attention keeps of the tokens it has seen.

Shapes: B batch, C channels, h heads, d = C / h, w window size, r summaries of a chunk, S summaries of all finished
chunks.
"""
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import torch
from torch import Tensor


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
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            found = f'{index.dtype} {list(index.shape)}' if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f'index is {found}, expected a tensor of integers (batch,).')
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    def detach(self) -> 'CausalState':
        """The same state without its graph, for truncated backpropagation through time."""
        return self._map(lambda t: t.detach())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.pair, self.summaries, self.open_sums, self.open_lse) if t is not None)

    def _map(self, function: Callable[[Tensor], Tensor]) -> 'CausalState':
        changes: Any = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changes)
