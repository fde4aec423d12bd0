"""CvT's convolutional projections: a depthwise 3 x 3 convolution of the grid in front of a linear map.

The linear maps are called `qkv` and `to_dynamic_projection` as in attention without convolutions, so that one list of
names finds them in both (adapters, quantisers, parameter groups).

Shapes: B batch, H x W grid, N = H * W tokens, C channels, D output channels.
"""
import re
from typing import Any, Callable, Dict, Tuple

import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from . import cpu


class ConvQKV(nn.Module):
    """Queries, keys or values: a depthwise convolution, batch norm and a linear map.

    The stride is 1 for all three, as in the paper's CvT*-LS (section 4.2).
    """

    def __init__(self, dim: int, bias: bool = True, device=None, dtype=None):
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.qkv = nn.Linear(dim, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C)."""
        x = to_tokens(self.norm(self.conv(x)))
        return self.qkv(x) if torch.jit.is_scripting() else cpu.linear(self.qkv, x)


class ConvScores(nn.Module):
    """Scores of CvT-LS's dynamic projection: a weight-standardised depthwise convolution, then a linear map."""

    def __init__(self, dim: int, out_features: int, device=None, dtype=None):
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = StdConv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd)
        self.to_dynamic_projection = nn.Linear(dim, out_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        x = to_tokens(self.conv(x))
        if torch.jit.is_scripting():
            return self.to_dynamic_projection(x)
        else:
            return cpu.linear(self.to_dynamic_projection, x)


def to_grid(x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, C, H, W), channels last in memory."""
    return x.reshape(x.shape[0], feat_size[0], feat_size[1], x.shape[2]).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def rename_old_keys(state_dict: Dict[str, Any], prefix: str) -> None:
    """Gives entries of old checkpoints, in which containers had the linear maps' names, the names of today."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = current_name(key[len(prefix):])
        if prefix + name != key:
            state_dict[prefix + name] = state_dict.pop(key)


def current_name(name: str) -> str:
    """The name within an attention layer that an old one stands for; itself where it is not old."""
    for pattern, new in _OLD_NAMES:
        match = re.match(pattern, name)
        if match:
            return new(match) + name[match.end():]
    return name


_KINDS = ('query', 'key', 'value')
_OLD_NAMES: Tuple[Tuple[str, Callable[[re.Match], str]], ...] = (
    (r'qkv\.conv\.([012])\.0\.', lambda match: f'{_KINDS[int(match[1])]}.conv.'),
    (r'qkv\.conv\.([012])\.1\.', lambda match: f'{_KINDS[int(match[1])]}.norm.'),
    (r'qkv\.proj\.([012])\.', lambda match: f'{_KINDS[int(match[1])]}.qkv.'),
    (r'to_dynamic_projection\.conv\.0\.', lambda match: 'scores.conv.'),
    (r'to_dynamic_projection\.proj\.', lambda match: 'scores.to_dynamic_projection.'),
)
