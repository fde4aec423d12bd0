"""Attention layers over a grid or a sequence of tokens."""
from .causal_attention import CausalLongShortAttention1d
from .causal_state import CausalState, RaggedState
from .full_attention import FullAttention2d
from .long_short_attention import AttentionMaps, LongShortAttention2d
from .sequence_attention import LongShortAttention1d

__all__ = [
    'AttentionMaps', 'CausalLongShortAttention1d', 'CausalState', 'FullAttention2d', 'LongShortAttention1d',
    'LongShortAttention2d', 'RaggedState',
]
