"""Which kind of call this is: one that only wants a result, or one whose single operations somebody follows.

An opaque operator or a library's private one is faster, and a closed door to exporters, functorch transforms and
everything else that follows operations. The questions here decide; nothing else in the package does.
"""
from typing import Optional

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_MATMUL = torch.matmul  # profilers in the manner of DeepSpeed's put a function of their own in its place


def is_followed(*tensors: Optional[Tensor]) -> bool:
    """True where the operations must be PyTorch's own, for whoever follows them.

    These are exporting and tracing, functorch transforms (vmap, grad, jvp), forward-mode AD, tensor subclasses,
    dispatch modes of other libraries, such as their FLOP counters, and functions put in the place of PyTorch's matmul.
    PyTorch's own modes (its counter, selective
    checkpointing) and `torch.compile` take registered operators as they are.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or _is_transformed()
    return (
        torch.jit.is_tracing() or _is_transformed() or forward_ad._current_level >= 0
        or _has_foreign_mode() or torch.matmul is not _MATMUL
        or any(t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors))


def is_empty(x: Tensor) -> bool:
    """True for an eager call without images: kernels need not know that case, and PyTorch's own give no gradients."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and x.shape[0] == 0


def is_plain_inference(x: Tensor) -> bool:
    """True in eager inference that nobody follows: no autograd, compilation, tracing, transform, mode or subclass.

    Nor a profiler, which counts the FLOPs of PyTorch's own operators alone.
    """
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled() or is_followed(x))


def _is_transformed() -> bool:
    """True inside of a functorch transform."""
    return torch._C._are_functorch_transforms_active()


def _has_foreign_mode() -> bool:
    """True where a dispatch mode is active that is not one of PyTorch's."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(not type(mode).__module__.startswith('torch.') for mode in _get_current_dispatch_mode_stack())
