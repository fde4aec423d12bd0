"""What attention over sequences is measured against: layers with the same weights that work in other ways.

Shapes: B batch, N tokens, C channels, h heads, d = C / h, w window size, p key margin, T = N / w windows, K = w + 2 * p
keys of a window, r rank; c chunk size, S summaries of all chunks.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ls_vision.layers import CausalLongShortAttention1d, LongShortAttention1d
from ls_vision.layers.sinusoids import sinusoids


class TileCopying1d(nn.Module):
    """Bidirectional attention the way the released code works: keys and values in overlapping tiles, logits in full.

    It shares the parameters of the layer it is made from, and its results. The window must divide the length.
    """

    def __init__(self, layer: LongShortAttention1d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        layer = self.layer
        B, N, _ = x.shape
        h, w, r = layer.num_heads, layer.window_size, layer.rank
        padding = x.new_zeros(B, N, dtype=torch.bool)  # the released code always has a mask
        q = heads(layer.W_q(x), h) * layer.scale
        k, v = heads(layer.dual_ln_l(layer.W_k(x)), h), heads(layer.dual_ln_l(layer.W_v(x)), h)
        scores = layer.dconv_fc(x).masked_fill(padding.unsqueeze(-1), float('-inf')).softmax(1, dtype=torch.float32)
        scores = scores.to(x.dtype).view(B, N, h, r).permute(0, 2, 3, 1)  # (B, h, r, N)
        k_long, v_long = (heads(layer.dual_ln_s((scores @ t).transpose(1, 2).flatten(2)), h) for t in (k, v))

        p = max(w // 2, 1)
        tiles = [F.pad(t, (0, 0, p, p)).unfold(2, w + 2 * p, w) for t in (k, v)]  # (B, h, T, d, K)
        outside = F.pad(padding, (p, p), value=True).unfold(1, w + 2 * p, w)[:, None, :, None]  # (B, 1, T, 1, K)
        window = q.view(B, h, N // w, w, -1) @ tiles[0]
        window = window.masked_fill(outside, float('-inf')).view(B, h, N, -1)
        attn = torch.cat([q @ k_long.transpose(-1, -2), window], dim=-1).float().softmax(-1).to(x.dtype)
        attn = attn.masked_fill(padding[:, None, :, None], 0.)
        out = attn[..., :r] @ v_long
        out = out + (attn[..., r:].view(B, h, N // w, w, -1) @ tiles[1].transpose(-1, -2)).view(B, h, N, -1)
        return layer.W_o(out.transpose(1, 2).flatten(2))


class FullAttention1d(nn.Module):
    """Full attention of the same width, by PyTorch's fused kernel; causal or not."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor], length: int) -> Tensor:
        """Decodes one token (B, 1, C) with a key-value cache of (B, h, capacity, d) each, `length` of them in use."""
        q, *new = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        for kept, token in zip(cache, new):
            kept[:, :, length:length + 1] = token
        out = F.scaled_dot_product_attention(q, *(t[:, :, :length + 1] for t in cache))
        return self.proj(out.transpose(1, 2).flatten(2))


class MaskedFullAttention1d(nn.Module):
    """Full attention called as `LongShortAttention1d` is: with padding and global tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(
            self,
            x: Tensor,
            key_padding_mask: Tensor | None = None,
            global_tokens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) -> (B, N, C), and (B, g, C) of the global tokens where there are any."""
        g = 0 if global_tokens is None else global_tokens.shape[1]
        x = x if global_tokens is None else torch.cat([global_tokens, x], dim=1)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        # a text without a token sees itself, which nobody reads
        seen = None if key_padding_mask is None else ~F.pad(key_padding_mask, (g, 0))[:, None, None]
        if seen is not None and g == 0:
            seen = seen | ~seen.any(-1, keepdim=True)
        out = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return out if global_tokens is None else (out[:, g:], out[:, :g])


class FixedProjection1d(nn.Module):
    """Linformer's projection in place of the dynamic one: learned scores of positions, the same for every text."""

    def __init__(self, num_scores: int, max_length: int):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(max_length, num_scores))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, h * r)."""
        return self.scores[:x.shape[1]].to(x.dtype).expand(x.shape[0], -1, -1)


class TileCopyingCausal(nn.Module):
    """Causal attention the way the released code works, without a memory in front.

    Each window of w queries has a tile of 2 * w keys; the logits of the w keys of each query are cut out of their
    products, and for the values put back. All logits and weights are kept. It shares the parameters of the layer it is
    made from, and its results. Window and chunk must divide the length.
    """

    def __init__(self, layer: CausalLongShortAttention1d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        layer = self.layer
        B, N, C = x.shape
        h, w, c, r = layer.num_heads, layer.window_size, layer.chunk_size, layer.chunk_rank
        d, T = C // h, N // w
        q = heads(layer.proj_query(x), h).contiguous() * layer.scale
        k, v = layer.proj_key(x), layer.proj_val(x)
        scores = layer.dconv_1(x).view(B, N // c, c, h, r).permute(0, 3, 1, 4, 2)
        scores = scores.softmax(-1, dtype=torch.float32).to(x.dtype)  # (B, h, chunks, r, c)
        k_long, v_long = (
            (scores @ t.view(B, N // c, c, h, d).permute(0, 3, 1, 2, 4)).reshape(B, h, -1, d) for t in (k, v))
        k_long, v_long = (
            heads(layer.dual_ln_dproj(t.transpose(1, 2).flatten(2)), h).contiguous() for t in (k_long, v_long))
        k, v = (F.pad(layer.dual_ln_win(t), (0, 0, w, 0)) for t in (k, v))  # (B, w + N, C)
        tiles = [t.unfold(1, 2 * w, w).unflatten(2, (h, d)).transpose(1, 2) for t in (k, v)]  # (B, h, T, d, 2w)

        window = (q.view(B, h, T, w, d) + layer.r_w_bias) @ tiles[0]  # (B, h, T, w, 2w)
        stride = window.stride()
        window = window.as_strided((B, h, T, w, w), (*stride[:3], stride[3] + 1, 1), 1).reshape(B, h, N, w)
        distances = torch.arange(w, device=x.device).flip(0)
        near = layer.r_net(sinusoids(distances, C).to(x.dtype)).view(w, h, d).permute(1, 2, 0)
        window = window + (q + layer.r_r_bias) @ near
        before = torch.arange(N, device=x.device)[:, None] < torch.arange(w - 1, -1, -1, device=x.device)
        window = window.masked_fill(before, float('-inf'))  # no tokens before the first; zeros in the released code

        S = N // c * r
        far = layer.r_net_chunk(sinusoids(torch.arange(S, device=x.device).flip(0), C).to(x.dtype)).view(S, h, d)
        by_distance = (q @ far.permute(1, 2, 0)).view(B, h, N // c, c, S).transpose(2, 3)
        by_distance = F.pad(by_distance, (0, r)).contiguous()
        stride = by_distance.stride()
        shifted = by_distance.as_strided(
            (B, h, c, N // c, S), (*stride[:3], stride[3] - r, 1), N // c * r)
        chunks = q @ k_long.transpose(-1, -2) + shifted.transpose(2, 3).reshape(B, h, N, S)
        late = torch.arange(S, device=x.device) // r >= (torch.arange(N, device=x.device) // c)[:, None]
        attn = torch.cat([chunks.masked_fill(late, float('-inf')), window], dim=-1).float().softmax(-1).to(x.dtype)
        spread = F.pad(attn[..., S:].reshape(B, h, T, w, w), (1, w))
        stride = spread.stride()
        spread = spread.as_strided((B, h, T, w, 2 * w), (*stride[:3], stride[3] - 1, 1))
        out = attn[..., :S] @ v_long + (spread @ tiles[1].transpose(-1, -2)).view(B, h, N, d)
        return layer.proj_out(out.transpose(1, 2).flatten(2))


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
