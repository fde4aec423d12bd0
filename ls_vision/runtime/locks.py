"""A folder that one run holds, so that a second one does not write into it."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

_held: set[int] = set()  # file descriptors


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder during the block. The system lets go of it where the process ends, however it ends.

    Where the platform or the file system has no such locks, nothing is held.

    Raises:
        UserError: Another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f'{folder} is being written by another run: wait for its end, or choose another --experiment') from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _let_go() -> None:
    """Loader processes must not hold the folder of a run that was killed."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go)
