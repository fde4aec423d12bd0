"""The checkpoints in a run's folder: the last one, the one before it, and the best one."""
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.archives import load_checkpoint, write_checkpoint
from ..runtime.errors import UserError
from ..runtime.files import atomic_write

LAST = 'last.pth.tar'  # timm's names, so that its scripts find the files
BEST = 'model_best.pth.tar'
PREVIOUS = 'previous.pth.tar'  # the LAST before; read where LAST is damaged


def save_checkpoint(folder: Path, state: dict[str, Any], is_best: bool) -> Path:
    """Write `state` as the last checkpoint and, where it is the best so far, as the best one too.

    The last checkpoint so far is kept as the previous one. A kill between the two renames leaves the previous one,
    which is then read.

    Raises:
        UserError: A weight is not finite, or the disk is full; the files are unchanged.
    """
    broken = next((name for name, weight in _weights(state) if not bool(torch.isfinite(weight).all())), None)
    if broken is not None:
        raise UserError(f'{broken} is not finite: no checkpoint was written, the last one in {folder} is kept')
    last = folder / LAST
    with atomic_write(last, keep=folder / PREVIOUS) as file:
        write_checkpoint(state, file)
    if is_best:
        with open(last, 'rb') as source, atomic_write(folder / BEST) as file:
            shutil.copyfileobj(source, file)
    return last


def load_latest(folder: Path, say: Callable[[str], Any] = print) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run's folder: the last one or, where that is damaged, the one before.

    Args:
        folder: A run's folder.
        say: Takes the note that the last one was damaged.

    Returns:
        The checkpoint's dictionary; None where the folder holds none.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    errors = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except UserError as e:
            errors.append(str(e))
            continue
        if errors:
            say(f'{errors[0]}; resuming from {path}')
        return checkpoint
    if errors:
        raise UserError('; '.join(errors))
    return None


def _weights(state: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """The weights in a checkpoint, averaged ones included, by name."""
    for key in ('state_dict', 'state_dict_ema'):
        for name, weight in state.get(key, {}).items():
            yield f'{key}.{name}', weight
