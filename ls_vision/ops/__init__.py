"""Long-short attention as a function of tensors, and the dense reference it is measured against."""
from .functional import long_short_attention
from .reference import reference_attention

__all__ = ['long_short_attention', 'reference_attention']
