"""Questions about sizes that add no guard to a compiled graph of open sizes.

A guard makes a compiler compile again for images that answer it differently, and an exporter refuse them.
"""
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def are_equal(size: int, other: int) -> bool:
    """Whether sizes are equal; False while compiling if that is not known."""
    if torch.compiler.is_compiling():
        return statically_known_true(size == other)
    return size == other


def is_multiple(size: int, divisor: int) -> bool:
    """Whether a size is a multiple of a number; False while compiling if that is not known."""
    if torch.compiler.is_compiling():
        return statically_known_true(size % divisor == 0)
    return size % divisor == 0
