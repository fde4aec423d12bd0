"""The norm that brings keys and values of windows and of summaries to one scale (paper, section 3.3)."""
import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops.numerics import autocast_dtype, without_autocast


@register_notrace_module  # reason: asks for the device of its input
class DualLayerNorm(nn.LayerNorm):
    """LayerNorm in its input's precision also under autocast, which would keep input and output in float32.

    The statistics are float32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if torch.jit.is_scripting():
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        if autocast_dtype(x) is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with without_autocast(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
