"""Long-Short Transformer vision backbones for timm. Importing this package registers the models."""
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__

__all__ = ['FullAttention2d', 'LongShortAttention2d', '__version__', 'long_short_attention', 'models']

# As scripts and as modules of `python -m`.
COMMANDS = ('ls-vision', 'ls-vision-run', 'ls_vision', 'ls_vision.cli', 'ls_vision.export', 'ls_vision.run')


def _is_command() -> bool:
    """Whether this process is one of the commands."""
    if sys.argv[:1] == ['-m'] and '-m' in sys.orig_argv[:-1]:  # while Python looks for the module
        return sys.orig_argv[sys.orig_argv.index('-m') + 1] in COMMANDS
    return os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ''))[0] in COMMANDS


def __getattr__(name: str) -> Any:
    if name in __all__:
        _load()
        return globals()[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _load() -> None:
    models = importlib.import_module('.models', __name__)
    from .layers import FullAttention2d, LongShortAttention2d
    from .ops import long_short_attention
    globals().update(
        models=models, FullAttention2d=FullAttention2d, LongShortAttention2d=LongShortAttention2d,
        long_short_attention=long_short_attention)


if TYPE_CHECKING:
    from . import models
    from .layers import FullAttention2d, LongShortAttention2d
    from .ops import long_short_attention
elif not _is_command():  # a command answers --help, and refuses wrong arguments, before seconds of imports
    _load()
