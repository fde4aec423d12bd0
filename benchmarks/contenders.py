"""What long-short attention is measured against: layers with the same weights that work in other ways.

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, d = C / h,
r rank, M = r + g additional keys, w window size, p key margin, T windows, Q = w * w queries, K = (w + 2p)^2 keys.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.ops.window import num_keys, num_windows, square_window


class TileCopying(nn.Module):
    """Works the way the released code does: keys and values copied into overlapping tiles, logits and weights in full.

    It shares the parameters of the layer it is made from, and its results.
    """

    def __init__(self, layer: LongShortAttention2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        layer = self.layer
        B, _, C = x.shape
        H, W = feat_size
        g, h, w, M = layer.num_global_tokens, layer.num_heads, layer.window_size, layer.rank + layer.num_global_tokens
        window = square_window(w)
        d, p, (nH, nW) = C // h, window.row_margin, num_windows(feat_size, window)
        q, k, v = layer.qkv(x).chunk(3, dim=-1)  # (B, L, C) each
        q, k, v = q * layer.scale, layer.dual_ln_full(k), layer.dual_ln_full(v)

        k_extra, v_extra = k[:, :g], v[:, :g]
        if layer.rank:
            scores = layer.to_dynamic_projection(x[:, g:])  # (B, N, h * r)
            weights = scores.transpose(1, 2).reshape(B, h, -1, H * W).softmax(-1)  # (B, h, r, N)
            summaries = (weights @ heads(t[:, g:], h) for t in (k, v))  # (B, h, r, d)
            k_long, v_long = (layer.dual_ln_dp(t.transpose(1, 2).flatten(2)) for t in summaries)  # (B, r, C)
            k_extra, v_extra = torch.cat([k_long, k_extra], 1), torch.cat([v_long, v_extra], 1)  # (B, M, C)

        grow = (0, 0, p, nW * w - W + p, p, nH * w - H + p)
        queries = F.pad(q[:, g:].view(B, H, W, C), (0, 0, 0, nW * w - W, 0, nH * w - H))
        queries = queries.view(B, nH, w, nW, w, h, d).permute(0, 5, 1, 3, 2, 4, 6).reshape(B, h, nH * nW, w * w, d)
        k_tiles, v_tiles = (self.tiles(F.pad(t[:, g:].view(B, H, W, C), grow)) for t in (k, v))  # (B, h, T, K, d)
        outside = self.tiles(F.pad(x.new_zeros(1, H, W, h), grow, value=1.))[0, 0, :, :, 0].bool()  # (T, K)

        window = queries @ k_tiles.transpose(-2, -1)  # (B, h, T, Q, K)
        bias = layer.position_bias()
        if bias is not None:
            window = window + bias.unsqueeze(1).to(window.dtype)
        window = window.masked_fill(outside.unsqueeze(1), float('-inf'))
        extra = queries @ heads(k_extra, h).unsqueeze(2).transpose(-2, -1)  # (B, h, T, Q, M)
        weights = torch.cat([extra, window], dim=-1).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        out = weights[..., :M] @ heads(v_extra, h).unsqueeze(2) + weights[..., M:] @ v_tiles  # (B, h, T, Q, d)
        out = out.view(B, h, nH, nW, w, w, d).permute(0, 2, 4, 3, 5, 1, 6).reshape(B, nH * w, nW * w, C)
        x = out[:, :H, :W].reshape(B, H * W, C)
        if g:
            attended = attend(q[:, :g], torch.cat([k[:, :g], x], 1), torch.cat([v[:, :g], x], 1), h, scale=1.)
            x = torch.cat([attended, x], dim=1)
        return layer.proj(x)

    def tiles(self, x: Tensor) -> Tensor:
        """Padded (B, H', W', C) -> (B, h, T, K, C / h), a copy of each key in every window that sees it."""
        w = self.layer.window_size
        side = w + 2 * square_window(w).row_margin
        x = x.unfold(1, side, w).unfold(2, side, w)  # (B, nH, nW, C, side, side)
        B, nH, nW = x.shape[:3]
        x = x.reshape(B, nH, nW, self.layer.num_heads, -1, side * side)
        return x.permute(0, 3, 1, 2, 5, 4).reshape(B, self.layer.num_heads, nH * nW, side * side, -1)


class Floor(nn.Module):
    """The layer's linear maps, its norms, and attention to tiles and a mask that somebody gathered before, for free.

    Its results mean nothing. What leaves out the keys beyond the grid's edges, masked here, can be faster.
    """

    def __init__(self, layer: LongShortAttention2d, batch: int, feat_size: tuple[int, int]):
        super().__init__()
        self.layer = layer
        h, w, d = layer.num_heads, layer.window_size, layer.dim // layer.num_heads
        window = square_window(w)
        T = math.prod(num_windows(feat_size, window))
        J = layer.rank + layer.num_global_tokens + num_keys(window)
        like = layer.proj.weight
        self.q, self.k, self.v = (
            torch.randn(batch, T * h, n, d, device=like.device, dtype=like.dtype).requires_grad_()
            for n in (w * w, J, J))
        self.mask = torch.zeros(1, T * h, w * w, J, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """(B, L, C) -> everything that was computed."""
        layer = self.layer
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        k, v = layer.dual_ln_full(k), layer.dual_ln_full(v)
        computed = [q, k, v]
        if layer.rank:
            r = layer.rank
            computed += [layer.to_dynamic_projection(x), layer.dual_ln_dp(k[:, :r]), layer.dual_ln_dp(v[:, :r])]
        attended = F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask, scale=layer.scale)
        return (*computed, attended, layer.proj(x))


def full_attention(layer: LongShortAttention2d) -> FullAttention2d:
    """Full attention of the same width without a position bias, so that SDPA's fastest kernels can serve it."""
    like = layer.proj.weight
    return FullAttention2d(
        layer.dim, layer.num_heads, num_global_tokens=layer.num_global_tokens, qkv_bias=True,
        device=like.device, dtype=like.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """(B, g, C) queries and (B, L, C) keys and values -> (B, g, C)."""
    q, k, v = (heads(t, num_heads) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) -> (B, h, L, d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
