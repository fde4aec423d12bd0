"""Files that are replaced as a whole: a kill or a full disk leaves the previous content."""
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str], keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing and reading; at the end of the block it becomes `path`.

    At every moment `path` is either the previous file or the complete new one. Code that can only write to a path may
    write to the file's `name`.

    Args:
        path: File to write. Its folder must exist.
        keep: Where to move the file that is replaced.

    Raises:
        UserError: The disk is full or the folder cannot be written; `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'w+b') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError that it raises while it handles the OSError.
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            reason = cause.strerror or str(cause)
            raise UserError(f'{path} cannot be written: {reason}; its previous content is unchanged') from e
        raise
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def check_output(path: str | os.PathLike[str], option: str, suffix: str = '') -> Path:
    """Refuse, before any work, a file that could not be written after it.

    Args:
        path: Of the file.
        option: Name of the argument that gave it.
        suffix: Ending that the file must have, e.g. '.png'.

    Raises:
        UserError: Its folder is missing or cannot be written, it is a folder itself, or it has another ending.
    """
    path = Path(path)
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f'{option} {path}: must end in {suffix}')
    if path.is_dir():
        raise UserError(f'{option} {path}: is a folder; name a file')
    if not path.parent.is_dir():
        raise UserError(f'{option} {path}: there is no folder {path.parent}')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UserError(f'{option} {path}: its folder cannot be written: {e.strerror}') from e
    return path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by a text in UTF-8; see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the platform can open a folder."""
    if not hasattr(os, 'O_DIRECTORY'):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
