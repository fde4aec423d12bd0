"""Long-short attention as a function of tensors."""
from .attention import long_short_attention
from .window import Window

__all__ = ['Window', 'long_short_attention']
