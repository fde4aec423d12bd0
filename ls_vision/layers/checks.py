"""Checks of arguments that several layers share: one clear error that prints the value and what is accepted."""
from numbers import Integral
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError where channels can't be divided among heads."""
    check_at_least(1, dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f'dim {dim} is not divisible by num_heads {num_heads}.')


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """Raises ValueError where a value is none of those accepted."""
    if value not in accepted:
        raise ValueError(f'{name} is {value!r}, expected one of {", ".join(repr(a) for a in accepted)}.')


def check_token_count(num_tokens: int, num_global_tokens: int, feat_size: Tuple[int, int]) -> None:
    """Raises ValueError where a sequence is not the global tokens and a grid."""
    if num_tokens != num_global_tokens + feat_size[0] * feat_size[1]:
        raise ValueError(
            f'Got {num_tokens} tokens, but a grid of {feat_size[0]} x {feat_size[1]} with {num_global_tokens} '
            f'global tokens has {num_global_tokens + feat_size[0] * feat_size[1]}.')


def check_at_least(smallest: int, **values: int) -> None:
    """Raises ValueError where one of the named values is no whole number or is smaller."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ValueError(f'{name} is {value!r}, expected a whole number of {smallest} or more.')
        if value < smallest:
            raise ValueError(f'{name} is {value}, expected {smallest} or more.')


def check_tokens(name: str, x: Any, dim: int, batch: Optional[int] = None) -> None:
    """Raises ValueError where x is not (batch, tokens, dim)."""
    shape = list(x.shape) if isinstance(x, Tensor) else None
    if shape is None or len(shape) != 3 or shape[2] != dim or (batch is not None and shape[0] != batch):
        found = f'type {type(x).__name__}' if shape is None else f'shape {shape}'
        raise ValueError(f'{name} has {found}, expected ({"batch" if batch is None else batch}, tokens, {dim}).')


def describe(value: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    return f'{value.dtype} {list(value.shape)}' if isinstance(value, Tensor) else type(value).__name__


def embed(embedding: nn.Embedding, tokens: Any) -> Tensor:
    """`embedding(tokens)`, (B, N) -> (B, N, C).

    Raises:
        ValueError: The tokens are no (batch, tokens) of whole numbers, or not those of the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f'tokens is {describe(tokens)}, expected whole numbers (batch, tokens) of type int64 or int32.')
    try:
        return embedding(tokens)
    except IndexError:
        raise ValueError(
            f'tokens has numbers from {tokens.min()} to {tokens.max()}, expected 0 to '
            f'{embedding.num_embeddings - 1}.') from None
