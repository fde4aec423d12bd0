"""Devices: whether one can be used, whether its memory ran out, and mixed precision on it."""
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import UserError, first_line

_OUT_OF_MEMORY_SIGNS = ("can't allocate memory", 'bad_alloc', 'not enough memory', 'out of memory')


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        UserError: The device is unknown or not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device {device} cannot be used: {first_line(e)}') from e


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)


def autocast(device: torch.device, amp: bool, dtype: str) -> AbstractContextManager[Any]:
    """The context of a forward pass: mixed precision with `dtype` as the lower one, or nothing without `amp`."""
    return torch.autocast(device.type, getattr(torch, dtype)) if amp else nullcontext()
