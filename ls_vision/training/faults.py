"""Non-finite losses: the step is skipped and counted, and several in a row abort the training."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..runtime.errors import UserError


class FiniteGuard:
    """Counts the steps with a non-finite loss or gradient.

    Args:
        patience: Consecutive skipped steps that abort the training.
        hint: Advice that the error ends with.
    """

    def __init__(self, patience: int, hint: str = 'try a lower learning rate, or gradient clipping'):
        self.patience, self.hint = patience, hint
        self.skipped = 0  # in total
        self.in_a_row = 0

    def accept(self, loss: float, finite: bool, where: str) -> bool:
        """Whether to take the step.

        Args:
            loss: The step's loss, for the message.
            finite: Whether loss and gradients are finite, on every process.
            where: The step, for the message.

        Raises:
            UserError: `patience` steps in a row were skipped.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= self.patience:
            kind = f'loss {loss}' if not math.isfinite(loss) else 'gradients not finite'
            raise UserError(
                f'{kind} at {where}: {self.in_a_row} steps in a row were skipped, {self.skipped} in total; '
                f'none of them changed the weights; {self.hint}')
        return finite

    def state_dict(self) -> dict[str, int]:
        return dict(skipped=self.skipped, in_a_row=self.in_a_row)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state['skipped'], state['in_a_row']


def gradients_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is finite; waits for the device once."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.isfinite(float(torch.nn.utils.get_total_norm(gradients))) if gradients else True
