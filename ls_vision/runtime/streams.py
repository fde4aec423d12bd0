"""Standard output and error that cannot show a character, or that nobody reads."""
import os
import sys
from typing import Any


def print_any_text() -> None:
    """Let a character that the locale's encoding lacks be printed as an escape instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def silence(stream: Any) -> None:
    """Send what is still to come to nowhere, also what Python writes when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (AttributeError, OSError, ValueError):
        return  # closed, or not a file
