"""Standard streams that are closed, that cannot show a character, or that nobody reads."""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def prepare_streams() -> None:
    """Open streams that were closed, and let a character that the locale's encoding lacks be printed as an escape.

    The next files that a program opens would otherwise get the numbers of closed streams, and what libraries print
    would end up in them.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'r+'))  # noqa: SIM115  (as long as the program)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def silence(stream: Any) -> None:
    """Send what is still to come to nowhere, also what Python writes when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (AttributeError, OSError, ValueError):
        return  # closed, or not a file


@contextmanager
def without_reader(stream: Any) -> Iterator[None]:
    """A block of output to a stream whose terminal may be closed, or whose reader may be gone; nobody needs the rest.

    A run goes on without it, or saves: what it says is in its files too.
    """
    try:
        yield
    except (AttributeError, OSError, ValueError):  # there is none, it is broken, it is closed
        silence(stream)
