"""Attention weights in the open, for those who look at them, drop some, or export them.

Shapes: Q queries, K keys, d head width; any leading dimensions.
"""
from typing import Optional

import torch
from torch import Tensor

from .precision import without_autocast


def attention_weights(q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) with logits and statistics in float32, or double for doubles.

    Half precision would make infinities of logits beyond 65,504, and NaN of these.

    Args:
        q: (..., Q, d).
        k: (..., K, d).
        mask: Added to the logits, of a shape that broadcasts to theirs; None for none.
        scale: Factor on the products.

    Returns:
        (..., Q, K), in the dtype of q.
    """
    if torch.jit.is_scripting():
        return _weights(q, k, mask, scale)
    with without_autocast(q):
        return _weights(q, k, mask, scale)


def _weights(q: Tensor, k: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    dtype = q.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        q, k = q.float(), k.float()
    logits = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1).to(dtype)
