"""A malicious pickle, for tests that it is refused."""
import os
from pathlib import Path


class Gadget:
    """A malicious pickle: loading it would run a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)
