"""What autocast asks for, and how to leave it."""
import contextlib
from typing import ContextManager, Optional

import torch
from torch import Tensor


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
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def without_autocast(x: Tensor) -> ContextManager:
    """A block in which operations on the tensor's device keep the precision of their inputs."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
