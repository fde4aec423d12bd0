"""The choice of a backend, and those with a backward pass of their own behind one pair of functions."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .blocked import blocked_backward, blocked_forward

BACKENDS = ('reference', 'blocked', 'triton')

Gradients = Tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]


def choose_backend(name: str, query: Tensor, window_size: int) -> str:
    """The backend of that name; by default Triton's kernels on a GPU that runs them, else the portable one.

    Raises:
        ValueError: The named backend can't run here.
    """
    if name == 'triton' and not _has_triton(query):
        raise ValueError(
            f"backend 'triton' can't run on {query.device.type} tensors of {query.dtype} here; it needs the triton "
            "package and CUDA tensors of 16 or 32 bits. Use 'blocked'.")
    if not name and query.is_cuda and _has_triton(query):
        from . import triton_backend
        name = 'triton' if triton_backend.fits(query, window_size) else ''
    return name or 'blocked'


def _has_triton(query: Tensor) -> bool:
    from . import triton_backend  # here, for PyTorch has builds without Triton
    return triton_backend.is_available() and query.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(
        backend: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
) -> Tuple[Tensor, Tensor]:
    """Output and the statistics that the backend's backward pass wants, without gradients."""
    args = (query, key, value, window_size, additional_keys, additional_values, bias, scale)
    if backend == 'triton':
        from .triton_backend import triton_forward
        return triton_forward(*args)
    return blocked_forward(*args), query.new_empty(0, dtype=torch.float32)


def backward(
        backend: str,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int,
        additional_keys: Optional[Tensor],
        additional_values: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        out: Tensor,
        statistics: Tensor,
) -> Gradients:
    """Gradients of query, key, value, additional keys and values, and bias."""
    if backend == 'triton':
        from .triton_backend import triton_backward
        return triton_backward(
            grad_out, query, key, value, window_size, additional_keys, additional_values, bias, scale, out, statistics)
    return blocked_backward(
        grad_out, query, key, value, window_size, additional_keys, additional_values, bias, scale)
