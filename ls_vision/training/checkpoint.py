"""Checkpoints: written so that a kill leaves the previous file whole, read so that nothing in a file runs."""
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import clean_state_dict
from torch import nn

from ..models._checkpoint import describe_mismatch
from ..models._hierarchical import HierarchicalTransformer
from .errors import UserError, first_line

LAST = 'last.pth.tar'  # timm's names, so that its scripts find the files
BEST = 'model_best.pth.tar'


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    At every moment `path` is either the previous file or the complete new one.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # left only where writing failed
    _sync_folder(path.parent)


def save_checkpoint(folder: Path, state: dict[str, Any], is_best: bool) -> Path:
    """Write `state` as the last checkpoint and, where it is the best so far, as the best one too."""
    last = folder / LAST
    atomic_write(last, lambda file: torch.save(state, file))
    if is_best:
        with open(last, 'rb') as source:
            atomic_write(folder / BEST, lambda file: shutil.copyfileobj(source, file))
    return last


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of plain tensors and values on the CPU.

    Anything else in the pickle is refused before it runs.

    Args:
        path: A .safetensors file or a file written by `torch.save`.

    Returns:
        The checkpoint's dictionary.
    """
    if not os.path.isfile(path):
        raise UserError(f'checkpoint {path} does not exist')
    try:
        if str(path).endswith('.safetensors'):
            from safetensors.torch import load_file

            return load_file(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f'checkpoint {path} was refused: {_refused(path)}. Only plain tensors, numbers, strings and containers '
            'are read, because a pickle can run any code; save the `state_dict` alone, or as .safetensors') from e
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as e:
        raise UserError(f'checkpoint {path} is damaged or not a checkpoint: {first_line(e)}') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'checkpoint {path} holds a {type(checkpoint).__name__}, expected a dict of tensors')
    return checkpoint


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights, the averaged ones where it has them, into a model of the same architecture."""
    checkpoint = load_checkpoint(path)
    key = next((k for k in ('state_dict_ema', 'state_dict', 'model_ema', 'model') if k in checkpoint), None)
    weights = clean_state_dict(checkpoint[key] if key else checkpoint)
    if isinstance(model, HierarchicalTransformer):
        weights = model.filter_state_dict(weights)  # reads the released files, and other sizes
    mismatch = describe_mismatch(model.state_dict(), weights)
    if mismatch:
        raise UserError(f'checkpoint {path} does not fit {type(model).__name__}: {mismatch}')
    model.load_state_dict(weights)


def _refused(path: str | os.PathLike[str]) -> str:
    """The objects for which a pickle was refused; reading their names runs nothing."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: an old-style or foreign pickle
        names = []
    return f'it holds {", ".join(names)}' if names else 'it is not a file of plain tensors'


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the platform can open a folder."""
    if not hasattr(os, 'O_DIRECTORY'):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
