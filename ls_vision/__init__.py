"""Long-Short Transformer vision backbones for timm. Importing this package registers the models."""
from . import models
from ._version import __version__

__all__ = ['__version__', 'models']
