"""Linear maps of features, on the CPU in evaluation by the faster of PyTorch's two libraries.

`torch.nn.functional.linear` calls MKL for float32. oneDNN, which PyTorch has for its compiler and which knows no
gradients, is a tenth faster on a thousand tokens and a third on fifty, and applies the GELU to what is still in a cache
(two cores of an AMD EPYC, AVX-512).

Shapes: C input and D output channels.
"""
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .inference import is_eager_inference
from .precision import autocast_dtype

_HAS_BOTH = (
    torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_linear_pointwise'))


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], gelu: bool = False) -> Tensor:
    """A linear map, and then if asked for the exact GELU.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,) or None.
        gelu: Apply the GELU to the result.

    Returns:
        (..., D).
    """
    if not torch.jit.is_scripting() and _takes_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


@torch.jit.unused
def _takes_onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    if not _HAS_BOTH or not is_eager_inference(x) or not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    tensors = [x, weight] if bias is None else [x, weight, bias]
    plain = all(t.device.type == 'cpu' and t.dtype == torch.float32 for t in tensors)
    return plain and autocast_dtype(x) is None


if _HAS_BOTH and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]
