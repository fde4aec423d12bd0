"""Multiply-adds of layers in closed form, from their sizes alone.

Shapes: B batch, H x W grid, N = H * W tokens, g global tokens, L = g + N, C channels, r rank, w window size,
K = (w + 2p)^2 keys of a window and nH x nW windows that cover the grid; windows at its edge count fully.
"""
import math
from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from timm.models import swin_transformer
from torch import nn

from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.ops.window import make_window, num_keys, num_queries, num_windows

Macs = dict[str, int]
"""Multiply-adds by part of the model, a key of `PARTS` each."""

PARTS = ('convolution', 'linear', 'window', 'long-range', 'full attention')


def convolution(layer: Any, args: tuple, out: torch.Tensor) -> Macs:
    """k^2 C_in / groups for each output element."""
    return {'convolution': out.numel() * math.prod(layer.kernel_size) * layer.in_channels // layer.groups}


def linear(layer: Any, args: tuple, out: torch.Tensor) -> Macs:
    """C_out for each input element."""
    return {'linear': args[0].numel() * layer.out_features}


def long_short_attention(layer: LongShortAttention2d, args: tuple, out: torch.Tensor) -> Macs:
    """The attention itself, and the map to queries, keys and values where it is one linear map.

    Window: 2 nH nW w^2 K C. Long range: summaries 2 N r C, their and the global tokens' keys and values
    2 nH nW w^2 (r + g) C, and the global tokens' own attention 2 g (g + N) C.
    """
    (B, L, C), feat_size = args[0].shape, args[1]
    window, r, g = make_window(layer.window_size), layer.rank, layer.num_global_tokens
    N = L - g
    queries = N if window.rows == 0 else math.prod(num_windows(feat_size, window)) * num_queries(window)
    keys = num_keys(window)
    return {
        'window': 2 * B * queries * keys * C,
        'long-range': 2 * B * C * (N * r + queries * (r + g) + g * (g + N)),
    }


def full_attention(layer: nn.Module, args: tuple, out: torch.Tensor) -> Macs:
    """2 L^2 C."""
    B, L, C = args[0].shape
    return {'full attention': 2 * B * L ** 2 * C}


def window_attention(layer: nn.Module, args: tuple, out: torch.Tensor) -> Macs:
    """2 w^2 C for each token; the layer gets windows as a batch."""
    B, L, C = args[0].shape
    return {'window': 2 * B * L ** 2 * C}


# The formula of a layer is that of the first class that it is an instance of.
FORMULAS: dict[type, Callable[[Any, tuple, torch.Tensor], Macs]] = {
    LongShortAttention2d: long_short_attention,
    FullAttention2d: full_attention,
    swin_transformer.WindowAttention: window_attention,
    timm.layers.Attention: full_attention,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Linear: linear,
}


def find_formula(layer: nn.Module) -> Any:
    """The layer's formula, or None where it has none."""
    return next((formula for kind, formula in FORMULAS.items() if isinstance(layer, kind)), None)


def count_by_formula(model: nn.Module, images: torch.Tensor) -> Macs:
    """Sum of the formulas of all layers that have one, at the sizes of a forward pass.

    Args:
        model: In evaluation, on the device of the images; with both on the meta device nothing is computed.
        images: (B, C, H, W).
    """
    total = dict.fromkeys(PARTS, 0)
    handles = []

    def add(layer: nn.Module, args: tuple, out: torch.Tensor) -> None:
        for part, macs in find_formula(layer)(layer, args, out).items():
            total[part] += macs

    for module in model.modules():
        if find_formula(module) is not None:
            handles.append(module.register_forward_hook(add))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return total
