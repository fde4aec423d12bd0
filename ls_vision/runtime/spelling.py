"""Suggestions for misspelt names."""
import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """'; did you mean 'a' or 'b'?', with up to `count` known names; empty where none is close."""
    known = list(known)
    close = (difflib.get_close_matches(name, known, n=count)
             or difflib.get_close_matches(name.replace('-', '_'), known, n=count))
    return f'; did you mean {" or ".join(map(repr, close))}?' if close else ''
