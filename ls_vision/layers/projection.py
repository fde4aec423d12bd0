"""From tokens to queries, keys, values and to the dynamic projection: linear (ViL-LS) and convolutional (CvT-LS).

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, r rank.
"""
from typing import List, Tuple

import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from ..ops.linear import linear
from .linear import Linear


class LinearQKV(Linear):
    """Queries, keys and values by one linear map."""

    def __init__(self, dim: int, bias: bool = True, device=None, dtype=None):
        super().__init__(dim, 3 * dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, L, C) -> (B, L, 3, C)."""
        x = linear(x, self.weight, self.bias)
        return x.reshape(x.shape[0], x.shape[1], 3, self.in_features)

    def apart(self, x: Tensor, feat_size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
        """(B, L, C) -> queries (B, L, C) and keys and values (B, L, 2, C), which a norm then takes without a copy."""
        C = self.in_features
        bias = self.bias
        if bias is None:
            q, kv = linear(x, self.weight[:C], None), linear(x, self.weight[C:], None)
        else:
            q, kv = linear(x, self.weight[:C], bias[:C]), linear(x, self.weight[C:], bias[C:])
        return q, kv.reshape(x.shape[0], x.shape[1], 2, C)


class ConvQKV(nn.Module):
    """CvT's convolutional projections: a depthwise 3 x 3 convolution, batch norm and a linear map for each of q, k, v.

    All three have stride 1, as in the paper's CvT*-LS (section 4.2). There is no room for global tokens.
    """

    def __init__(self, dim: int, bias: bool = True, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.ModuleList(_depthwise(nn.Conv2d, dim, norm=True, dd=dd) for _ in range(3))
        self.proj = nn.ModuleList(Linear(dim, dim, bias=bias, **dd) for _ in range(3))

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, 3, C)."""
        return torch.stack(self._project(x, feat_size), dim=2)

    def apart(self, x: Tensor, feat_size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
        """(B, N, C) -> queries (B, N, C) and keys and values (B, N, 2, C)."""
        q, k, v = self._project(x, feat_size)
        return q, torch.stack([k, v], dim=2)

    def _project(self, x: Tensor, feat_size: Tuple[int, int]) -> List[Tensor]:
        grid = _to_grid(x, feat_size)
        return [proj(_to_tokens(conv(grid))) for conv, proj in zip(self.conv, self.proj)]


class LinearDynamicProjection(Linear):
    """The paper's dynamic projection P (equation 3): a softmax over all local tokens of a linear map of them."""

    def __init__(self, dim: int, num_heads: int, rank: int, device=None, dtype=None):
        super().__init__(dim, num_heads * rank, device=device, dtype=dtype)
        self.num_heads = num_heads
        self.rank = rank

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, g + N, C), of which the last N make the grid -> (B, h, r, N), rows that sum to 1."""
        scores = linear(x, self.weight, self.bias)  # of global tokens too: to leave them out would copy the others
        scores = scores[:, x.shape[1] - feat_size[0] * feat_size[1]:]
        return _normalize_scores(scores, self.num_heads, self.rank)


class ConvDynamicProjection(nn.Module):
    """CvT-LS's dynamic projection: a weight-standardised depthwise 3 x 3 convolution, then a linear map."""

    def __init__(self, dim: int, num_heads: int, rank: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.rank = rank
        self.conv = _depthwise(StdConv2d, dim, norm=False, dd=dd)
        self.proj = Linear(dim, num_heads * rank, **dd)

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, h, r, N), rows that sum to 1."""
        scores = self.proj(_to_tokens(self.conv(_to_grid(x, feat_size))))
        return _normalize_scores(scores, self.num_heads, self.rank)


def _normalize_scores(scores: Tensor, num_heads: int, rank: int) -> Tensor:
    """(B, N, h * r) scores -> (B, h, r, N), softmax over the tokens."""
    B, N, _ = scores.shape
    scores = scores.transpose(1, 2).reshape(B, num_heads, rank, N)
    # accumulated in float32; the type is named since autocast would make the whole of it float32
    return scores.softmax(dim=-1, dtype=scores.dtype)


def _depthwise(conv: type, dim: int, norm: bool, dd: dict) -> nn.Sequential:
    layers = [conv(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd)]
    if norm:
        layers.append(nn.BatchNorm2d(dim, **dd))
    return nn.Sequential(*layers)


def _to_grid(x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, C, H, W), channels last in memory."""
    return x.reshape(x.shape[0], feat_size[0], feat_size[1], x.shape[2]).permute(0, 3, 1, 2)


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)
