"""Attention layers over a grid or a sequence of tokens."""
from .full_attention import FullAttention2d
from .long_short_attention import AttentionMaps, LongShortAttention2d
from .sequence_attention import LongShortAttention1d

__all__ = ['AttentionMaps', 'FullAttention2d', 'LongShortAttention1d', 'LongShortAttention2d']
