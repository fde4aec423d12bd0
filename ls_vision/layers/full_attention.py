"""Full attention over a grid and its global tokens, with the relative position bias of ViL (arXiv 2103.15358).

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, d = C / h.
"""
from typing import Any, Final, List, NamedTuple, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops.inference import is_eager_inference
from ..ops.weights import attention_weights
from .checks import check_heads, check_token_count
from .linear import Linear
from .position_bias import grid_bias, grid_bias_rows, resize_grid_bias
from .projection import ConvQKV, LinearQKV

# reason for both: sizes that are Proxies would decide control flow or go into arange
register_notrace_function(grid_bias)
register_notrace_function(check_token_count)


# What a layer may keep of its position bias: enough for grids of 24 x 24 (384 px) and 6 heads in float32.
KEPT_BIAS_BYTES = 2 ** 23


class KeptBias(NamedTuple):
    """A position bias and what it was made of."""
    bias: Tensor
    feat_size: Tuple[int, int]
    tables: List[Any]


# not attributes of the layers, so that copies and files of a model hold weights alone
_kept: 'WeakKeyDictionary[nn.Module, KeptBias]' = WeakKeyDictionary()


class FullAttention2d(nn.Module):
    """Every token attends to every token; on a grid other than `feat_size` the position bias is interpolated.

    The parameter names are those of the released implementation.
    """
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
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
        if num_global_tokens < 0:
            raise ValueError(f'num_global_tokens is {num_global_tokens}, expected 0 or more.')
        if conv_projection and num_global_tokens:
            raise ValueError(f'num_global_tokens is {num_global_tokens}, convolutional projections allow only 0.')
        self.dim = dim
        self.num_heads = num_heads
        self.num_global_tokens = num_global_tokens
        # TorchScript wants a pair, also of a module without a position bias
        self.feat_size: Tuple[int, int] = (0, 0) if feat_size is None else (feat_size[0], feat_size[1])
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()

        self.qkv = (ConvQKV if conv_projection else LinearQKV)(dim, bias=qkv_bias, **dd)
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
        self.proj = Linear(dim, dim, **dd)
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

    @torch.jit.unused
    def _position_bias_in_evaluation(self, feat_size: Tuple[int, int], dtype: torch.dtype) -> Optional[Tensor]:
        """`position_bias` in a dtype, made anew where weights, grid or dtype are not those of the call before."""
        tables: List[Tensor] = list(self.parameters(recurse=False))
        if not tables or any(type(t) is not nn.Parameter or not _is_comparable(t) for t in tables):
            bias = self.position_bias(feat_size)
            return None if bias is None else bias.to(dtype)
        kept = _kept.get(self)
        if kept is None or kept.feat_size != feat_size or kept.bias.dtype != dtype or not _are(tables, kept.tables):
            bias = self.position_bias(feat_size)
            assert bias is not None
            kept = KeptBias(bias.to(dtype), feat_size, [_fingerprint(t) for t in tables])
            if kept.bias.nbytes <= KEPT_BIAS_BYTES:
                _kept[self] = kept
        return kept.bias

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
        check_token_count(L, self.num_global_tokens, feat_size)
        qkv = self.qkv(x, feat_size)  # (B, L, 3, C)
        qkv = qkv.reshape(B, L, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, h, L, d)
        if not torch.jit.is_scripting() and is_eager_inference(x):
            bias = self._position_bias_in_evaluation(feat_size, q.dtype)
        else:
            bias = self.position_bias(feat_size)
        if bias is not None:
            bias = bias.to(q.dtype).unsqueeze(0)  # (1, h, L, L)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            x = self.attn_drop(attention_weights(q, k, bias, self.scale)) @ v

        x = x.transpose(1, 2).reshape(B, L, C)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return (
            f'dim={self.dim}, num_heads={self.num_heads}, feat_size={self.feat_size}, '
            f'num_global_tokens={self.num_global_tokens}'
        )


def _is_comparable(table: Tensor) -> bool:
    """On the CPU values are compared, elsewhere versions, since to compare values would wait for the device."""
    return table.device.type == 'cpu' or (table.device.type != 'meta' and not table.is_inference())


def _fingerprint(table: Tensor) -> Any:
    data = table.detach()
    return data.clone() if table.device.type == 'cpu' else (data.data_ptr(), table._version, table.dtype)


def _are(tables: List[Tensor], fingerprints: List[Any]) -> bool:
    """Are the tables what the fingerprints were taken of?"""
    for table, known in zip(tables, fingerprints):
        if isinstance(known, Tensor) and table.device.type == 'cpu':
            if table.dtype != known.dtype or table.shape != known.shape or not torch.equal(table, known):
                return False
        elif isinstance(known, Tensor) or known != _fingerprint(table):
            return False
    return len(tables) == len(fingerprints)
