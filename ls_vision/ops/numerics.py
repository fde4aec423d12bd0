"""Precision: what autocast asks for, how to leave it, and a softmax whose statistics are float32.

Shapes: Q queries, K keys, d head width; any leading dimensions.
"""
import contextlib
from typing import ContextManager, Optional

import torch
from torch import Tensor


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which leaves nothing in an exported graph where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The precision of logits, sums and log-sum-exps: float64 for doubles, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def allows_tf32() -> bool:
    """Whether the user allows PyTorch products of float32 in TF32 on a GPU; then they are allowed here.

    Tensor cores read the leading 19 bits of an operand, so Triton's operands are truncated, where cuBLAS rounds them.
    """
    # `allow_tf32` raises once anybody has set precisions by name
    precision = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if precision == 'none' else precision) == 'tf32'  # type: ignore[attr-defined]


def autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """The precision of matrix products where autocast is on for the tensor's device, else None."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def to_autocast(x: Tensor) -> Tensor:
    """The tensor in the precision of matrix products where autocast is on; doubles stay as they are."""
    if torch.jit.is_scripting():
        return x
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else to_dtype(x, dtype)


def without_autocast(x: Tensor) -> ContextManager:
    """A block in which operations on the tensor's device keep the precision of their inputs."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def masked_logit(dtype: torch.dtype) -> float:
    """What is added to the logits of masked keys: no weight remains, and a row of nothing else has no NaN."""
    return -3e4 if dtype == torch.float16 else -1e30


def attention_logits(q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    """scale * q k^T + mask in float32, or double for doubles.

    In half precision, logits beyond 65,504 would be infinite and their softmax NaN.

    Args:
        q: (..., Q, d).
        k: (..., K, d).
        mask: Added to the logits, of a shape that broadcasts to theirs; None for none.
        scale: Factor on the products.

    Returns:
        (..., Q, K).
    """
    if torch.jit.is_scripting():
        return _logits(q, k, mask, scale)
    with without_autocast(q):
        return _logits(q, k, mask, scale)


def attention_weights(q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    """The softmax of `attention_logits`, (..., Q, K) in the dtype of q."""
    return to_dtype(attention_logits(q, k, mask, scale).softmax(dim=-1), q.dtype)


def _logits(q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    logits = torch.matmul(at_least_float32(q) * scale, at_least_float32(k).transpose(-2, -1))
    return logits if mask is None else logits + mask
