"""Long-Short Transformer vision backbones for timm. Importing this package registers the models."""
from . import models
from ._version import __version__
from .layers import FullAttention2d, LongShortAttention2d
from .ops import long_short_attention

__all__ = ['FullAttention2d', 'LongShortAttention2d', '__version__', 'long_short_attention', 'models']
