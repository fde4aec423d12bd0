"""Sinusoids of distances between tokens, and linear maps of them, kept where one token after another needs them."""
from typing import List, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.calls import is_plain_inference
from . import cpu

SMALLEST_TABLE = 256


def sinusoids(distances: Tensor, dim: int) -> Tensor:
    """(n,) distances -> (n, dim) float32: the sines of all frequencies, then the cosines (Transformer-XL)."""
    even = torch.arange(0, dim, 2, device=distances.device, dtype=torch.float32)
    angles = distances.float()[:, None] * (1 / 10000 ** (even / dim))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Table(NamedTuple):
    """Vectors of the distances ..., 1, 0, and the parameters they were made with."""
    vectors: Tensor
    parameters: List[Tensor]
    clamp: int


# not attributes of the modules, so that copies and files of a model hold weights alone
_kept: 'WeakKeyDictionary[nn.Module, Table]' = WeakKeyDictionary()


def distance_vectors(module: nn.Linear, count: int, clamp: int, like: Tensor) -> Tensor:
    """The linear map of the sinusoids of the distances count - 1 .. 0.

    In plain inference on the CPU the vectors are kept, until a parameter changes: a token would otherwise cost a
    product of all distances with the map.

    Args:
        module: C -> C.
        count: Number of distances.
        clamp: Larger distances are taken for this one; -1 for none.
        like: The tokens, which say where and in which precision to compute.

    Returns:
        (count, C).
    """
    parameters: List[Tensor] = list(module.parameters())
    if not is_plain_inference(like) or not cpu.is_unmodified(module, nn.Linear) or any(
            type(p) is not nn.Parameter or p.device.type != 'cpu' for p in parameters):
        return _make(module, count, clamp, like)
    table = _kept.get(module)
    if (table is None or table.clamp != clamp or len(table.vectors) < count or table.vectors.dtype != like.dtype
            or not cpu.are_equal(parameters, table.parameters)):
        length = SMALLEST_TABLE
        while length < count:
            length *= 2
        table = Table(_make(module, length, clamp, like), [p.detach().clone() for p in parameters], clamp)
        _kept[module] = table
    return table.vectors[len(table.vectors) - count:]


def _make(module: nn.Linear, count: int, clamp: int, like: Tensor) -> Tensor:
    distances = torch.arange(count - 1, -1, -1, device=like.device)
    if clamp >= 0:
        distances = distances.clamp(max=clamp)
    return module(sinusoids(distances, module.in_features).to(like.dtype))
