'''Attention layers over a grid of tokens.'''
from .full_attention import FullAttention2d
from .long_short_attention import AttentionMaps, LongShortAttention2d

__all__ = ['AttentionMaps', 'FullAttention2d', 'LongShortAttention2d']
