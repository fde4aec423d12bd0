"""Small problems with ragged edges, which show whether a backend is right on a machine.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys; Q queries and K keys of a window.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..numerics import allows_tf32
from ..window import Window, num_keys, num_queries, square_window

# In the order in which backward functions return them.
GRADIENTS = (
    'gradient of queries', 'gradient of keys and values', 'gradient of additional keys and values',
    'gradient of the bias')

# Largest error as a fraction of the largest entry, forward and backward.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 2e-2

DTYPES = tuple(_TOLERANCE)


class Problem(NamedTuple):
    """What a layer asks of the operator, but for the image and the precision."""
    head_dim: int
    window: Window
    num_additional: Optional[int]
    """M; None where there are no additional keys at all."""
    has_bias: bool

    def __str__(self) -> str:
        return (
            f'head width {self.head_dim}, window {_describe(self.window)}, '
            f'{self.num_additional or "no"} additional keys, {"with" if self.has_bias else "no"} bias')


def _describe(window: Window) -> str:
    if window == square_window(window.rows):
        return str(window.rows)
    return f'{window.rows} x {window.cols} with margins {window.row_margin} and {window.col_margin}'


class Sums(NamedTuple):
    """What the long-range half asks for: weighted sums over all tokens."""
    head_dim: int
    rows: int
    """Sums per head: summaries or global queries."""
    kinds: int
    """1 where keys and values are the same tensor, else 2."""
    is_global: bool

    def __str__(self) -> str:
        what = 'global tokens' if self.is_global else 'summaries'
        return f'head width {self.head_dim}, {self.rows} {what}, {self.kinds} kinds of tokens'


class SumInputs(NamedTuple):
    """Of a forward and a backward pass of `Sums`, B images of N tokens."""
    tokens: Tensor
    """(B, N, kinds, h, d)."""
    scores: Tensor
    """(B, h, rows, N) of summaries."""
    query: Tensor
    """(B, rows, h, d) of global tokens."""
    own: Tensor
    """(B, rows, 2, h, d), keys and values of the global tokens."""
    grad: Tensor
    """(B, rows, kinds of the sums, h, d), gradient of the sums."""


def draw_sums(problem: Sums, dtype: torch.dtype, device: torch.device) -> SumInputs:
    """Random inputs of two images, of so many tokens that kernels take them in chunks, the last of them ragged."""
    generator = torch.Generator().manual_seed(0)
    (d, rows, kinds, is_global), B, N, h = problem, 2, 600, 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return SumInputs(
        randn(B, N, kinds, h, d), randn(B, h, rows, N), randn(B, rows, h, d), randn(B, rows, 2, h, d),
        randn(B, rows, 1 if is_global else kinds, h, d))


class Inputs(NamedTuple):
    """Of a forward and a backward pass."""
    query: Tensor
    """(B, H, W, h, d)."""
    pair: Tensor
    """(B, H, W, 2, h, d)."""
    additional: Optional[Tensor]
    """(B, M, 2, h, d)."""
    bias: Optional[Tensor]
    """(h, Q, K)."""
    grad: Tensor
    """(B, H, W, h, d), gradient of the output."""


def draw(problem: Problem, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random inputs of two images: windows in two rows and a column, and more of them cut off."""
    generator = torch.Generator().manual_seed(0)  # of its own: the user's random numbers stay as they are
    B, h, d, window = 2, 2, problem.head_dim, problem.window
    H, W = 2 * window.rows + (window.rows + 1) // 2, window.cols + (window.cols + 1) // 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return Inputs(
        randn(B, H, W, h, d), randn(B, H, W, 2, h, d),
        None if problem.num_additional is None else randn(B, problem.num_additional, 2, h, d),
        randn(h, num_queries(window), num_keys(window)) if problem.has_bias else None, randn(B, H, W, h, d))


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How far a backend may be off in that precision, as a fraction of the largest entry."""
    return _TF32_TOLERANCE if dtype == torch.float32 and device.type == 'cuda' and allows_tf32() else _TOLERANCE[dtype]


def largest_error(
        names: Sequence[str],
        actual: Sequence[Optional[Tensor]],
        expected: Sequence[Optional[Tensor]],
) -> Tuple[float, str]:
    """The largest difference as a fraction of the largest entry, NaN counting as infinite, and of which result."""
    errors = [(0., names[0])]
    for name, x, y in zip(names, actual, expected):
        if x is not None and y is not None and y.numel() > 0:
            error = float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-6))
            errors.append((error if error == error else float('inf'), name))
    return max(errors)
