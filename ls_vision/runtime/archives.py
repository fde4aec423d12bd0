"""Checkpoint files: verified by a checksum when they are read, and nothing in them is run.

A checkpoint is the zip archive that `torch.save` writes, with the SHA-256 of its bytes as the archive's comment. It
stays one file, so that content and checksum cannot be separated, and timm and plain `torch.load` read it.
"""
import hashlib
import os
import pickle
from typing import Any, BinaryIO

import torch

from .errors import UserError, first_line

_ZIP_END = b'PK\x05\x06'
_ZIP_END_SIZE = 22  # bytes of the record that ends an archive without a comment; its last two are the comment's length
_CHECKSUM_TAG = b'sha256:'
_COMMENT_SIZE = len(_CHECKSUM_TAG) + 64
_CHUNK = 1 << 20


def write_checkpoint(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, then the checksum of all bytes before it as the archive's comment."""
    torch.save(state, file)
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_SIZE.to_bytes(2, 'little') + _CHECKSUM_TAG)
    digest = _sha256(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of plain tensors and values on the CPU.

    A pickle that holds anything else is refused before any of it runs.

    Args:
        path: A .safetensors file or a file written by `torch.save`.

    Returns:
        The checkpoint's dictionary.

    Raises:
        UserError: The file is missing, damaged or refused, or holds no dictionary.
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
    except MemoryError:
        raise
    except Exception as e:  # torch's reader raises many kinds for bytes that are no pickle
        raise UserError(f'checkpoint {path} is damaged or not a checkpoint: {first_line(e)}') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'checkpoint {path} holds a {type(checkpoint).__name__}, expected a dict of tensors')
    return checkpoint


def _verify_checksum(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose bytes have changed since they were written; files of other programs have no checksum."""
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


def _refused(path: str | os.PathLike[str]) -> str:
    """The objects for which a pickle was refused; reading their names runs nothing."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: an old-style or foreign pickle
        names = []
    return f'it holds {", ".join(names)}' if names else 'it is not a file of plain tensors'
