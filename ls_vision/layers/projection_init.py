"""How the dynamic projection starts, where a model is asked to start it otherwise than its other linear maps.

With timm's start (standard deviation 0.02) scores are nearly the same for all tokens, and so all r summaries of a head
start as the same mean of the image. Larger scores make them differ. A start of the bias could not: it shifts a
summary's scores of all tokens alike, and the softmax over tokens cancels that. Nor does a temperature need an option of
its own: at the start it is a factor on the scores.

Shapes: C channels, h heads, r rank.
"""
from typing import List, Sequence, Union

import torch
from torch import nn

ORTHOGONAL = 'orthogonal'
CONV_GAIN = 3.
"""Of ConvScores' convolution for independent tokens: each channel sums 9 of them with weights of mean square 1."""


def check_projection_init(projection_init: Union[float, str, None], dim: int, rank: int) -> None:
    """Raises ValueError where `projection_init` is not accepted, or cannot be had at this width."""
    if projection_init is None:
        return
    if rank == 0:
        raise ValueError(f'projection_init is {projection_init!r}, expected None with rank 0: nothing to start.')
    if projection_init == ORTHOGONAL:
        if rank > dim:
            raise ValueError(f'projection_init is {ORTHOGONAL!r}, expected a rank of {dim} (dim) or less, got {rank}.')
        return
    is_number = isinstance(projection_init, (int, float)) and not isinstance(projection_init, bool)
    if not is_number or not 0 < projection_init <= torch.finfo(torch.float32).max:  # type: ignore[operator]
        raise ValueError(
            f'projection_init is {projection_init!r}, expected None, {ORTHOGONAL!r}, or the standard deviation of the '
            'scores, a number above 0.')


def starts_of_stages(
        projection_init: Union[float, str, None],
        attn_types: Sequence[str],
        ranks: Sequence[int],
) -> List[Union[float, str, None]]:
    """A model's start for each stage, None for those without a dynamic projection.

    Raises:
        ValueError: A start is asked for and no stage has a dynamic projection.
    """
    has_projection = [attn_type == 'long-short' and rank > 0 for attn_type, rank in zip(attn_types, ranks)]
    if projection_init is not None and not any(has_projection):
        raise ValueError(
            f'projection_init is {projection_init!r}, expected None where no stage has a dynamic projection: '
            f'attn_types {tuple(attn_types)}, rank {tuple(ranks)}.')
    return [projection_init if has else None for has in has_projection]


@torch.no_grad()
def start_scores(linear: nn.Linear, num_heads: int, projection_init: Union[float, str], gain: float = 1.) -> None:
    """Starts the map from tokens to scores, (h * r, C), in place; its bias becomes 0.

    Args:
        linear: The map.
        num_heads: h.
        projection_init: The standard deviation of the scores, or 'orthogonal'.
        gain: Standard deviation of the map's input.
    """
    weight = linear.weight
    if isinstance(projection_init, str):
        for rows in weight.unflatten(0, (num_heads, -1)):  # (r, C) of a head
            rows.copy_(nn.init.orthogonal_(torch.empty_like(rows, dtype=torch.float32)) / gain)  # no QR in 16 bits
    else:
        nn.init.normal_(weight, std=projection_init / gain / weight.shape[1] ** .5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
