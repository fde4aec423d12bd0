"""Checkpoints: written so that a kill or a full disk leaves the previous file whole, read so that nothing in them runs.

A checkpoint is the zip archive that `torch.save` writes, with the SHA-256 of its bytes as the archive's comment: one
file, so that content and checksum can't part, and one that timm and plain `torch.load` read.
"""
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..models._checkpoint import describe_mismatch
from ..models._hierarchical import HierarchicalTransformer
from .errors import UserError, first_line

LAST = 'last.pth.tar'  # timm's names, so that its scripts find the files
BEST = 'model_best.pth.tar'
PREVIOUS = 'previous.pth.tar'  # what LAST was before it; read where LAST is damaged

_ZIP_END = b'PK\x05\x06'
_ZIP_END_SIZE = 22  # bytes of the record that ends an archive without a comment; the comment's length is its last two
_CHECKSUM_TAG = b'sha256:'
_COMMENT_SIZE = len(_CHECKSUM_TAG) + 64
_CHUNK = 1 << 20


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    At every moment `path` is either the previous file or the complete new one.

    Raises:
        UserError: The disk is full or the folder can't be written; `path` is as it was.
    """
    temporary = _write_temporary(path, write)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save_checkpoint(folder: Path, state: dict[str, Any], is_best: bool) -> Path:
    """Write `state` as the last checkpoint and, where it is the best so far, as the best one too.

    The last checkpoint so far is kept as the previous one.

    Raises:
        UserError: A weight is not finite, or the disk is full; the files are as they were.
    """
    broken = next((name for name, weight in _weights(state) if not bool(torch.isfinite(weight).all())), None)
    if broken is not None:
        raise UserError(f'{broken} is not finite: no checkpoint was written, the last one in {folder} stands')
    last = folder / LAST
    temporary = _write_temporary(last, lambda file: _write_with_checksum(state, file))
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    os.replace(temporary, last)  # a kill between the two renames leaves PREVIOUS, which is then read
    _sync_folder(folder)
    if is_best:
        with open(last, 'rb') as source:
            atomic_write(folder / BEST, lambda file: shutil.copyfileobj(source, file))
    return last


def load_latest(folder: Path, say: Callable[[str], Any] = print) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run's folder: the last one or, where that is damaged, the one before.

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
            say(f'{errors[0]}; going on from {path}')
        return checkpoint
    if errors:
        raise UserError('; '.join(errors))
    return None


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
        _verify_checksum(path)
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


def load_weights(model: nn.Module, path: str | os.PathLike[str], new_classifier: bool = False) -> None:
    """Load a checkpoint's weights, the averaged ones where it has them, into a model of the same architecture.

    Args:
        model: A model of timm's.
        path: A checkpoint or a file of weights.
        new_classifier: Keep the model's own classifier where the file's is one of other classes.

    Raises:
        UserError: The file is missing, damaged, refused, or of another architecture.
    """
    checkpoint = load_checkpoint(path)
    key = next((k for k in ('state_dict_ema', 'state_dict', 'model_ema', 'model') if k in checkpoint), None)
    weights = clean_state_dict(checkpoint[key] if key else checkpoint)
    if isinstance(model, HierarchicalTransformer):
        weights = model.filter_state_dict(weights)  # reads the released files, and other sizes
    if new_classifier:
        weights = _keep_classifier(model, weights)
    mismatch = describe_mismatch(model.state_dict(), weights)
    if mismatch:
        raise UserError(f'checkpoint {path} does not fit {type(model).__name__}: {mismatch}')
    model.load_state_dict(weights)


def _keep_classifier(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the model's classifier in the place of one of another shape."""
    own = model.state_dict()
    names = model.pretrained_cfg['classifier']  # type: ignore[index, union-attr]
    prefixes = tuple(f'{name}.' for name in ((names,) if isinstance(names, str) else names))
    classifier = {name: weight for name, weight in own.items() if name.startswith(prefixes)}
    if all(name in weights and weights[name].shape == weight.shape for name, weight in classifier.items()):
        return weights
    return {**weights, **classifier}


def _write_temporary(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """A complete file beside `path`, flushed to the disk; nothing is left of it where writing fails."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'w+b') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError raised while it handles the OSError
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            reason = cause.strerror or str(cause)
            raise UserError(f'{path} cannot be written: {reason}; what was there before is whole') from e
        raise
    return temporary


def _write_with_checksum(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, then the checksum of all bytes before it as the archive's comment."""
    torch.save(state, file)
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_SIZE.to_bytes(2, 'little') + _CHECKSUM_TAG)
    digest = _sha256(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def _verify_checksum(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose bytes are not those that were written; files of other programs carry no checksum."""
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        if size < _ZIP_END_SIZE + _COMMENT_SIZE:
            return
        file.seek(size - _ZIP_END_SIZE - _COMMENT_SIZE)
        end = file.read()
        if not end.startswith(_ZIP_END) or end[_ZIP_END_SIZE:-64] != _CHECKSUM_TAG:
            return
        digest = _sha256(file, size - 64)
    if digest != end[-64:]:
        raise ValueError('its SHA-256 is not the one written with it')


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Hexadecimal digest of a file's first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, _CHUNK):
        digest.update(file.read(min(_CHUNK, size - start)))
    return digest.hexdigest().encode()


def _weights(state: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """The weights in a checkpoint, averaged ones included, by name."""
    for key in ('state_dict', 'state_dict_ema'):
        for name, weight in state.get(key, {}).items():
            yield f'{key}.{name}', weight


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
