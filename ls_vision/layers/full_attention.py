"""Full attention over a grid and its global tokens, with the relative position bias of ViL (arXiv 2103.15358).

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, d = C / h.
"""
from typing import Any, Dict, Final, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops.calls import is_empty, is_followed
from ..ops.numerics import at_least_float32, attention_weights, to_dtype, without_autocast
from . import cpu
from .checks import check_at_least, check_heads, check_token_count
from .position_bias import grid_bias, grid_bias_rows, resize_grid_bias
from .projection import ConvQKV, rename_old_keys, to_grid


def dot_product_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Optional[Tensor],
        dropout_p: float,
        scale: float,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, (B, h, L, d); fused where nobody follows the operations."""
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    else:
        if is_followed(q, k, v, bias) or is_empty(q):
            return torch.matmul(F.dropout(attention_weights(q, k, bias, scale), dropout_p), v)
        if bias is not None and torch.is_grad_enabled() and q.device.type == 'cpu' and (
                q.requires_grad or bias.requires_grad):
            return _train_on_cpu(q, k, v, bias, dropout_p, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _train_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout_p: float, scale: float) -> Tensor:
    """With a bias, the CPU's fused kernel has no second derivative, and none at all where the bias has gradients.

    In float32 these are PyTorch's own steps to the last bit, except for its search of rows without any key, which takes
    a fifth of the time.
    """
    with without_autocast(q):
        q, k = (at_least_float32(t) * scale ** 0.5 for t in (q, k))
        weights = (torch.matmul(q, k.transpose(-2, -1)) + bias).softmax(dim=-1)
        return torch.matmul(F.dropout(to_dtype(weights, v.dtype), dropout_p), v)


# reason for all: sizes, dtypes or types that are Proxies would decide control flow or go into arange
for function in (grid_bias, check_token_count, dot_product_attention, attention_weights, to_dtype):
    register_notrace_function(function)


class FullAttention2d(nn.Module):
    """Every token attends to every token; on a grid other than `feat_size` the position bias is interpolated.

    The parameter names are those of the released implementation.
    """
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            *,
            feat_size: Optional[Tuple[int, int]] = None,
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            conv_projection: bool = False,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: C, channels of the tokens.
            num_heads: h.
            feat_size: (H, W) of the grid that the position bias is made for; None for no position bias.
            num_global_tokens: g, leading tokens.
            qkv_bias: Add a bias to queries, keys and values.
            conv_projection: Convolutional projections as in CvT instead of linear ones; needs num_global_tokens 0.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_heads(dim, num_heads)
        check_at_least(0, num_global_tokens=num_global_tokens)
        if conv_projection and num_global_tokens:
            raise ValueError(f'num_global_tokens is {num_global_tokens}, convolutional projections allow only 0.')
        self.dim = dim
        self.num_heads = num_heads
        self.num_global_tokens = num_global_tokens
        # TorchScript wants a pair, also of a module without a position bias
        self.feat_size: Tuple[int, int] = (0, 0) if feat_size is None else (feat_size[0], feat_size[1])
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()

        self.qkv: Optional[nn.Linear] = None
        self.query: Optional[nn.Module] = None
        self.key: Optional[nn.Module] = None
        self.value: Optional[nn.Module] = None
        if conv_projection:
            self.query, self.key, self.value = (ConvQKV(dim, bias=qkv_bias, **dd) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.local_relative_position_bias_table = None
        self.g2l_relative_position_bias = None
        self.g2g_relative_position_bias = None
        if feat_size is not None:
            g = num_global_tokens
            rows = grid_bias_rows(self.feat_size)
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **dd))
            if g > 0:
                self.g2l_relative_position_bias = nn.Parameter(torch.empty(2, num_heads, g, **dd))
                self.g2g_relative_position_bias = nn.Parameter(torch.empty(num_heads, g, g, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the module's own parameters, those of the position bias."""
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter, std=.02)

    @torch.jit.ignore
    def set_feat_size(self, feat_size: Tuple[int, int]) -> None:
        """Makes another grid the one that the position bias is made for; its table is resampled."""
        table = self.local_relative_position_bias_table
        if table is None or tuple(feat_size) == self.feat_size:
            return
        resized = resize_grid_bias(table.detach(), self.feat_size, feat_size)
        self.local_relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.feat_size = (feat_size[0], feat_size[1])

    def position_bias(self, feat_size: Tuple[int, int]) -> Optional[Tensor]:
        """(h, L, L) bias of the logits on a grid."""
        table = self.local_relative_position_bias_table
        if table is None:
            return None
        return grid_bias(
            table, self.g2g_relative_position_bias, self.g2l_relative_position_bias, self.feat_size, feat_size)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        q, k, v = self._project(x, feat_size)
        bias = self._bias(q, feat_size)
        if torch.jit.is_scripting():
            out = torch.matmul(self.attn_drop(attention_weights(q, k, bias, self.scale)), v)
        elif self.fused_attn and cpu.is_unmodified(self.attn_drop, nn.Dropout):
            out = dot_product_attention(
                q, k, v, bias, self.attn_drop.p if self.attn_drop.training else 0., self.scale)
        else:
            out = torch.matmul(self.attn_drop(attention_weights(q, k, bias, self.scale)), v)
        x = out.transpose(1, 2).flatten(2)  # from (B, h, L, d)
        x = self.proj(x) if torch.jit.is_scripting() else cpu.linear(self.proj, x)
        return self.proj_drop(x)

    @torch.jit.ignore
    def attention_maps(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """(B, h, L, L), the attention weights of a call of this layer with the same arguments, before dropout."""
        q, k, _ = self._project(x, feat_size)
        return attention_weights(q, k, self._bias(q, feat_size), self.scale)

    def _project(self, x: Tensor, feat_size: Tuple[int, int]) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, h, L, d) each."""
        B, L, _ = x.shape
        check_token_count(L, self.num_global_tokens, feat_size)
        if self.qkv is not None:
            qkv = self.qkv(x) if torch.jit.is_scripting() else cpu.linear(self.qkv, x)
        else:
            assert self.query is not None and self.key is not None and self.value is not None
            grid = to_grid(x, feat_size)
            qkv = torch.cat([self.query(grid), self.key(grid), self.value(grid)], dim=-1)
        h, d = self.num_heads, qkv.shape[-1] // (3 * self.num_heads)
        q, k, v = qkv.reshape(B, L, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _bias(self, q: Tensor, feat_size: Tuple[int, int]) -> Optional[Tensor]:
        """(1, h, L, L) in the dtype of q."""
        if torch.jit.is_scripting():
            bias = self.position_bias(feat_size)
        else:
            bias = cpu.position_bias(self, q, feat_size, self.position_bias)
        return None if bias is None else to_dtype(bias, q.dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        return (
            f'dim={self.dim}, num_heads={self.num_heads}, feat_size={self.feat_size}, '
            f'num_global_tokens={self.num_global_tokens}'
        )
