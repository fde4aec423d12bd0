"""Long-short attention over a 2-D grid of tokens (Zhu et al., NeurIPS 2021, arXiv 2107.02192).

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, d = C / h,
r rank, M = r + g additional keys, w window size, Q = w * w queries and K keys of a window.
"""
from typing import Final, Optional, Tuple

import torch
from timm.layers import trunc_normal_, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops import long_short_attention
from ..ops.global_attention import attend_globally
from ..ops.precision import to_autocast
from ..ops.summaries import summarize
from ..ops.tiles import gather_tiles, merge_windows
from ..ops.weights import attention_weights
from .checks import check_choice, check_heads, check_token_count
from .dual_norm import DualLayerNorm
from .linear import Linear
from .position_bias import WINDOW_BIASES, resize_window_bias, window_bias_index, window_bias_rows
from .projection import ConvDynamicProjection, ConvQKV, LinearDynamicProjection, LinearQKV

# reason for all eight: sizes or devices that are Proxies would decide control flow or go into arange
register_notrace_function(long_short_attention)
register_notrace_function(gather_tiles)
register_notrace_function(merge_windows)
register_notrace_function(summarize)
register_notrace_function(attend_globally)
register_notrace_function(attention_weights)
register_notrace_function(check_token_count)
register_notrace_function(to_autocast)

GLOBAL_ATTENTIONS = ('post', 'pre')


class LongShortAttention2d(nn.Module):
    """Attention to a window around each token and to r summaries of the whole image, in one softmax.

    Works on any grid, also one that is not square or not divisible by the window, and on another one in every call.
    Global tokens come first in the sequence. The parameter names are those of the released implementation.
    """
    fused_attn: Final[bool]
    relative_position_index: Optional[Tensor]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            window_size: int = 7,
            rank: int = 8,
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            rel_pos_bias: Optional[str] = 'released',
            global_attention: str = 'post',
            dual_ln: bool = True,
            conv_projection: bool = False,
            scale: Optional[float] = None,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: C, channels of the tokens.
            num_heads: h.
            window_size: w, queries of a window per side; 0 attends to the summaries and global tokens alone.
            rank: r, number of summaries per head; 0 attends to the window and global tokens alone.
            num_global_tokens: g, leading tokens that attend to all and that all attend to.
            qkv_bias: Add a bias to queries, keys and values.
            rel_pos_bias: Relative position bias of the window: 'released' (indexed as the released weights are,
                offsets share entries), 'unique' (an entry for each offset, better for new training) or None.
            global_attention: Keys of the global tokens: 'post' the local tokens' outputs (released ImageNet weights),
                'pre' their keys and values.
            dual_ln: Normalise keys and values of window and summaries to one scale (paper, section 3.3).
            conv_projection: Convolutional projections as in CvT instead of linear ones; needs num_global_tokens 0.
            scale: Factor on the logits, (dim / num_heads) ** -0.5 by default.
            attn_drop: Dropout rate of the attention weights of local tokens.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_heads(dim, num_heads)
        for name, value in dict(window_size=window_size, rank=rank, num_global_tokens=num_global_tokens).items():
            if value < 0:
                raise ValueError(f'{name} is {value}, expected 0 or more.')
        if window_size == 0 and rank + num_global_tokens == 0:
            raise ValueError('window_size, rank and num_global_tokens are all 0: there is nothing to attend to.')
        if rel_pos_bias is not None:
            check_choice('rel_pos_bias', rel_pos_bias, (*WINDOW_BIASES, None))
            if window_size < 1:
                raise ValueError(f'window_size is {window_size}, a window with a position bias needs 1 or more.')
        check_choice('global_attention', global_attention, GLOBAL_ATTENTIONS)
        if conv_projection and num_global_tokens:
            raise ValueError(f'num_global_tokens is {num_global_tokens}, convolutional projections allow only 0.')

        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.rel_pos_bias = rel_pos_bias
        self.global_attention = global_attention
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.fused_attn = use_fused_attn()

        self.qkv = (ConvQKV if conv_projection else LinearQKV)(dim, bias=qkv_bias, **dd)
        self.dual_ln_full = DualLayerNorm(dim, **dd) if dual_ln else nn.Identity()
        # what is not used does not exist
        self.to_dynamic_projection: Optional[nn.Module] = None
        self.dual_ln_dp: Optional[nn.Module] = None
        self.local_relative_position_bias_table: Optional[nn.Parameter] = None
        if rank > 0:
            projection = ConvDynamicProjection if conv_projection else LinearDynamicProjection
            self.to_dynamic_projection = projection(dim, num_heads, rank, **dd)
            self.dual_ln_dp = DualLayerNorm(dim, **dd) if dual_ln else nn.Identity()
        if rel_pos_bias is not None:
            rows = window_bias_rows(window_size, rel_pos_bias)
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **dd))
        self._init_buffers()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the module's own parameter, the bias table, and its index."""
        if self.local_relative_position_bias_table is not None:
            trunc_normal_(self.local_relative_position_bias_table, std=.02)
        self._init_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Recomputes what no checkpoint holds."""
        self._init_buffers()

    def _init_buffers(self) -> None:
        index = None
        if self.local_relative_position_bias_table is not None and self.rel_pos_bias is not None:
            device = self.local_relative_position_bias_table.device
            index = window_bias_index(self.window_size, self.rel_pos_bias, device)
        self.register_buffer('relative_position_index', index, persistent=False)

    @torch.jit.ignore
    def set_window_size(self, window_size: int) -> None:
        """Changes the window; the bias table is resampled to the new one.

        Raises:
            ValueError: The module has a window and the new one is not 1 or more, or it has none.
        """
        if window_size == self.window_size:
            return
        if self.window_size == 0 or window_size < 1:
            raise ValueError(f'Cannot change window_size from {self.window_size} to {window_size}, both must be > 0.')
        table = self.local_relative_position_bias_table
        self.window_size = window_size
        if table is not None and self.rel_pos_bias is not None:
            resized = resize_window_bias(table.detach(), window_size, self.rel_pos_bias)
            self.local_relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
            self._init_buffers()

    def position_bias(self) -> Optional[Tensor]:
        """(h, Q, K) bias of the window's logits."""
        table, index = self.local_relative_position_bias_table, self.relative_position_index
        if table is None or index is None:
            return None
        bias = table.t().contiguous().index_select(1, index.flatten())  # faster than table[index], backward above all
        bias = bias.view(-1, index.shape[0], index.shape[1])
        return bias if self.window_size > 1 else bias.expand(-1, -1, 9)

    def forward(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """
        Args:
            x: (B, g + N, C), normalised, global tokens first, then the grid row by row.
            feat_size: (H, W) of the grid, H * W = N.

        Returns:
            (B, g + N, C).

        Raises:
            ValueError: The grid does not match the number of tokens.
        """
        B, L, C = x.shape
        H, W = feat_size
        g, h = self.num_global_tokens, self.num_heads
        check_token_count(L, g, feat_size)
        x = to_autocast(x)  # once: each linear map would keep a copy of its own

        q, kv = self.qkv.apart(x, feat_size)  # (B, L, C), (B, L, 2, C)
        kv = self.dual_ln_full(kv)
        q_global, q_local = q.split([g, H * W], dim=1)
        kv_global, kv_local = kv.split([g, H * W], dim=1)
        additional_keys, additional_values = self._additional_keys(x, kv_global, kv_local, feat_size)  # (B, M, h, d)

        query = q_local.reshape(B, H, W, h, C // h)
        key, value = kv_local.reshape(B, H, W, 2, h, C // h).unbind(3)
        if self.fused_attn:
            out = long_short_attention(
                query, key, value, self.window_size, additional_keys, additional_values, self.position_bias(),
                scale=self.scale, dropout_p=self.attn_drop.p if self.training else 0.,
            )
        else:
            out = self._unfused(query, key, value, additional_keys, additional_values, feat_size)
        x = out.reshape(B, H * W, C)

        if g > 0:
            own_keys, own_values = kv_global.reshape(B, g, 2, h, C // h).unbind(2)  # (B, g, h, d) each
            if self.global_attention == 'post':
                key = value = x.reshape(B, H * W, h, C // h)  # the local outputs, both keys and values
            else:
                key, value = kv_local.reshape(B, H * W, 2, h, C // h).unbind(2)
            q = q_global.reshape(B, g, h, C // h)
            x = torch.cat([self._attend_globally(q, own_keys, own_values, key, value).reshape(B, g, C), x], dim=1)
        return self.proj_drop(self.proj(x))

    def _additional_keys(
            self,
            x: Tensor,
            kv_global: Tensor,
            kv_local: Tensor,
            feat_size: Tuple[int, int],
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Keys and values that every local token sees, (B, M, h, d) each: r summaries, then g global tokens.

        Args:
            x: (B, L, C).
            kv_global: (B, g, 2, C).
            kv_local: (B, N, 2, C).
            feat_size: (H, W).
        """
        B, N, _, C = kv_local.shape
        h, r = self.num_heads, self.rank
        additional = kv_global
        if self.to_dynamic_projection is not None and self.dual_ln_dp is not None:
            weights = self.to_dynamic_projection(x, feat_size)  # (B, h, r, N)
            tokens = kv_local.reshape(B, N, 2, h, C // h)
            if self.fused_attn and not torch.jit.is_scripting():
                long = summarize(weights, tokens)  # (B, 2, h, r, d)
            else:
                long = weights.unsqueeze(1) @ tokens.permute(0, 2, 3, 1, 4)
            long = long.permute(0, 3, 1, 2, 4).reshape(B, r, 2, C)
            additional = torch.cat([self.dual_ln_dp(long), kv_global], dim=1)
        elif self.num_global_tokens == 0:
            return None, None
        k, v = additional.reshape(B, -1, 2, h, C // h).unbind(2)
        return k, v

    def _unfused(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            additional_keys: Optional[Tensor],
            additional_values: Optional[Tensor],
            feat_size: Tuple[int, int],
    ) -> Tensor:
        """The windowed attention with its weights in the open, for inspection; (B, H, W, h, d)."""
        q, k, v, mask = gather_tiles(
            query, key, value, self.window_size, additional_keys, additional_values, self.position_bias())
        out = self.attn_drop(attention_weights(q, k, mask, self.scale)) @ v
        if self.window_size == 0:
            return out.transpose(1, 2).reshape(query.shape)
        return merge_windows(out, feat_size, self.window_size)

    def _attend_globally(
            self,
            query: Tensor,
            own_keys: Tensor,
            own_values: Tensor,
            keys: Tensor,
            values: Tensor,
    ) -> Tensor:
        """The global tokens' attention to their own (B, g, h, d) and to the local (B, N, h, d); (B, g, h, d)."""
        if self.fused_attn and not torch.jit.is_scripting():
            return attend_globally(query, own_keys, own_values, keys, values, self.scale)
        k = torch.cat([own_keys, keys], dim=1).transpose(1, 2)  # (B, h, L, d)
        v = torch.cat([own_values, values], dim=1).transpose(1, 2)
        return (attention_weights(query.transpose(1, 2), k, None, self.scale) @ v).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, rank={self.rank}, '
            f'num_global_tokens={self.num_global_tokens}, rel_pos_bias={self.rel_pos_bias!r}, '
            f'global_attention={self.global_attention!r}'
        )
