"""Losses that are not finite: the step is left out and counted, and a run of them ends the training."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import UserError


class FiniteGuard:
    """Counts the steps whose loss or gradients are not finite.

    Args:
        patience: So many in a row end the training.
        hint: What the error suggests to try.
    """

    def __init__(self, patience: int, hint: str = 'try a lower learning rate, or gradient clipping'):
        self.patience, self.hint = patience, hint
        self.skipped = 0  # in all
        self.in_a_row = 0

    def accept(self, loss: float, finite: bool, where: str) -> bool:
        """Whether to take the step.

        Args:
            loss: The step's loss, for the message.
            finite: Whether loss and gradients are finite, on every process.
            where: The step, for the message.

        Raises:
            UserError: It was one too many.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= self.patience:
            kind = f'loss {loss}' if not math.isfinite(loss) else 'gradients not finite'
            raise UserError(
                f'{kind} at {where}: {self.in_a_row} steps in a row were skipped, {self.skipped} in all, and none of '
                f'them changed the weights; {self.hint}')
        return finite

    def state_dict(self) -> dict[str, int]:
        return dict(skipped=self.skipped, in_a_row=self.in_a_row)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state['skipped'], state['in_a_row']


def gradients_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is finite; waits for the device once."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.isfinite(float(torch.nn.utils.get_total_norm(gradients))) if gradients else True
