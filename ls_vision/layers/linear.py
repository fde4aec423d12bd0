"""A linear layer that is fast in evaluation."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` by `ls_vision.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)
