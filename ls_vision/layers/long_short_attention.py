"""Long-short attention over a 2-D grid of tokens (Zhu et al., NeurIPS 2021, arXiv 2107.02192).

Shapes: B batch, H x W grid, N = H * W local tokens, g global tokens, L = g + N, C channels, h heads, d = C / h,
r rank, M = r + g additional keys, w window size, Q = w * w queries and K keys of a window.
"""
from typing import Any, Dict, Final, NamedTuple, Optional, Tuple, Union

import torch
from timm.layers import trunc_normal_, use_fused_attn
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops.attention import attend
from ..ops.backends.composite import merge_windows, tile_logits
from ..ops.long_range import attend_globally, global_weights, summarize
from ..ops.numerics import to_autocast, to_dtype
from ..ops.window import Window, make_window, window_size_of
from . import cpu
from .checks import check_at_least, check_choice, check_heads, check_token_count
from .norm import DualLayerNorm
from .position_bias import WINDOW_BIASES, resize_window_bias, window_bias_index, window_bias_rows
from .projection import ConvQKV, ConvScores, rename_old_keys, to_grid
from .projection_init import CONV_GAIN, check_projection_init, start_scores

# reason for all: sizes or devices that are Proxies would decide control flow or go into arange
for function in (
        attend, merge_windows, tile_logits, attend_globally, summarize, check_token_count, to_autocast, to_dtype):
    register_notrace_function(function)

GLOBAL_ATTENTIONS = ('post', 'pre')


class AttentionMaps(NamedTuple):
    """The attention weights of one call."""
    local: Tensor
    """(B, T, h, Q, M + K) of the queries of each window, or (B, 1, h, N, M) without windows: summaries, global tokens,
    then the window's keys."""
    projection: Optional[Tensor]
    """(B, h, r, N), the weights of each token in the summaries."""
    global_tokens: Optional[Tensor]
    """(B, h, g, L), the weights of the global tokens' queries."""
    summaries: Optional[Tensor]
    """(B, r, 2, h, d), keys and values of the summaries."""


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
            *,
            window_size: Union[int, Tuple[int, int]] = 7,
            rank: int = 8,
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            rel_pos_bias: Optional[str] = 'released',
            global_attention: str = 'post',
            dual_ln: bool = True,
            conv_projection: bool = False,
            projection_init: Union[float, str, None] = None,
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
            window_size: w, queries of a window per side, or (rows, columns); 0 attends to the summaries and global
                tokens alone.
            rank: r, number of summaries per head; 0 attends to the window and global tokens alone.
            num_global_tokens: g, leading tokens that attend to all and that all attend to.
            qkv_bias: Add a bias to queries, keys and values.
            rel_pos_bias: Relative position bias of the window: 'released' (indexed as the released weights are,
                offsets share entries), 'unique' (an entry for each offset, better for new training) or None.
            global_attention: Keys of the global tokens: 'post' the local tokens' outputs (released ImageNet weights),
                'pre' their keys and values.
            dual_ln: Normalise keys and values of window and summaries to one scale (paper, section 3.3).
            conv_projection: Convolutional projections as in CvT instead of linear ones; needs num_global_tokens 0.
            projection_init: Start of the dynamic projection: the standard deviation of its scores for normalised,
                independent tokens; 'orthogonal' for a deviation of 1 with weights that are orthogonal across the
                summaries of a head; None leaves it to whoever initialises linear maps.
            scale: Factor on the logits, (dim / num_heads) ** -0.5 by default.
            attn_drop: Dropout rate of the attention weights of local tokens.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_heads(dim, num_heads)
        sizes = dict(window_size=window_size) if isinstance(window_size, int) else {}
        check_at_least(0, **sizes, rank=rank, num_global_tokens=num_global_tokens)
        window = make_window(window_size)
        window_size = window_size_of(window)
        if window_size == 0 and rank + num_global_tokens == 0:
            raise ValueError('window_size, rank and num_global_tokens are all 0: there is nothing to attend to.')
        if rel_pos_bias is not None:
            check_choice('rel_pos_bias', rel_pos_bias, (*WINDOW_BIASES, None))
            if window_size == 0:
                raise ValueError(f'window_size is {window_size}, a window with a position bias needs 1 or more.')
        check_choice('global_attention', global_attention, GLOBAL_ATTENTIONS)
        if conv_projection and num_global_tokens:
            raise ValueError(f'num_global_tokens is {num_global_tokens}, convolutional projections allow only 0.')
        check_projection_init(projection_init, dim, rank)

        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self._window = (window.rows, window.cols, window.row_margin, window.col_margin)
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.rel_pos_bias = rel_pos_bias
        self.global_attention = global_attention
        self.projection_init = projection_init
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.fused_attn = use_fused_attn()

        # submodules that are not used are not created, so that state dicts hold nothing else
        self.qkv: Optional[nn.Linear] = None
        self.query: Optional[nn.Module] = None
        self.key: Optional[nn.Module] = None
        self.value: Optional[nn.Module] = None
        self.scores: Optional[nn.Module] = None
        self.to_dynamic_projection: Optional[nn.Linear] = None
        self.dual_ln_dp: Optional[nn.Module] = None
        self.local_relative_position_bias_table: Optional[nn.Parameter] = None
        if conv_projection:
            self.query, self.key, self.value = (ConvQKV(dim, bias=qkv_bias, **dd) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.dual_ln_full = DualLayerNorm(dim, **dd) if dual_ln else nn.Identity()
        if rank > 0:
            if conv_projection:
                self.scores = ConvScores(dim, num_heads * rank, **dd)
            else:
                self.to_dynamic_projection = nn.Linear(dim, num_heads * rank, **dd)
            self.dual_ln_dp = DualLayerNorm(dim, **dd) if dual_ln else nn.Identity()
        if rel_pos_bias is not None:
            rows = window_bias_rows(window_size, rel_pos_bias)
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **dd))
        self._init_buffers()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the module's own parameter, the bias table, its index, and the projection if asked to."""
        if self.local_relative_position_bias_table is not None:
            trunc_normal_(self.local_relative_position_bias_table, std=.02)
        self._init_buffers()
        self.init_projection()

    @torch.jit.ignore
    def init_projection(self) -> None:
        """Starts the dynamic projection as `projection_init` says; to be called after its linear map is initialised."""
        if self.projection_init is None:
            return
        if isinstance(self.to_dynamic_projection, nn.Linear):
            start_scores(self.to_dynamic_projection, self.num_heads, self.projection_init)
        elif isinstance(self.scores, ConvScores):
            start_scores(self.scores.to_dynamic_projection, self.num_heads, self.projection_init, CONV_GAIN)

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
    def set_window_size(self, window_size: Union[int, Tuple[int, int]]) -> None:
        """Changes the window; the bias table is resampled to the new one.

        Raises:
            ValueError: The module has a window and the new one is not 1 or more, or it has none.
        """
        if window_size == self.window_size:
            return
        if self.window_size == 0 or min(window_size if isinstance(window_size, tuple) else (window_size,)) < 1:
            raise ValueError(f'Cannot change window_size from {self.window_size} to {window_size}, both must be > 0.')
        table, old_size, window = self.local_relative_position_bias_table, self.window_size, make_window(window_size)
        self.window_size = window_size_of(window)
        self._window = (window.rows, window.cols, window.row_margin, window.col_margin)
        if table is not None and self.rel_pos_bias is not None:
            resized = resize_window_bias(table.detach(), window_size, self.rel_pos_bias, old_size)
            self.local_relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
            self._init_buffers()

    def position_bias(self) -> Optional[Tensor]:
        """(h, Q, K) bias of the window's logits."""
        table, index = self.local_relative_position_bias_table, self.relative_position_index
        if table is None or index is None:
            return None
        bias = table.t().contiguous().index_select(1, index.flatten())  # faster than table[index], backward above all
        bias = bias.view(-1, index.shape[0], index.shape[1])
        return bias if index.shape[1] > 1 else bias.expand(-1, -1, 9)  # windows of 1 have one entry for 3 x 3 keys

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
        query, q_global, pair, own, scores = self._project(x, feat_size)
        additional = self._additional(pair, own, scores)
        out = self._attend(query, pair, additional)
        x = out.flatten(3).flatten(1, 2)  # (B, N, C)
        if self.num_global_tokens > 0:
            out_global, _ = attend_globally(q_global, own, self._global_keys(out, pair), self.scale)  # (B, g, h, d)
            x = torch.cat([out_global.flatten(2), x], dim=1)
        x = self.proj(x) if torch.jit.is_scripting() else cpu.linear(self.proj, x)
        return self.proj_drop(x)

    @torch.jit.ignore
    def attention_maps(self, x: Tensor, feat_size: Tuple[int, int]) -> AttentionMaps:
        """The attention weights of a call of this layer with the same arguments, before dropout."""
        query, q_global, pair, own, scores = self._project(x, feat_size)
        window = self._make_window()
        additional = self._additional(pair, own, scores)
        logits, values = tile_logits(query, pair, window, additional, self.position_bias(), self.scale)
        local = to_dtype(logits.softmax(dim=-1), values.dtype)
        weights_global = None
        if self.num_global_tokens > 0:
            out = merge_windows(local @ values, feat_size, window)
            weights_global = global_weights(q_global, own, self._global_keys(out, pair), self.scale)
        if scores is None or additional is None:
            return AttentionMaps(local, None, weights_global, None)
        return AttentionMaps(local, scores.softmax(dim=-1), weights_global, additional[:, :scores.shape[2]])

    def _project(
            self,
            x: Tensor,
            feat_size: Tuple[int, int],
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
        """From the tokens to everything that attends and is attended to.

        Returns:
            query: (B, H, W, h, d) of the local tokens.
            q_global: (B, g, h, d).
            pair: (B, H, W, 2, h, d), keys and values of the local tokens.
            own: (B, g, 2, h, d), those of the global tokens.
            scores: (B, h, r, N) of the dynamic projection; None with rank 0.
        """
        B, L, _ = x.shape
        H, W = feat_size
        g, h = self.num_global_tokens, self.num_heads
        check_token_count(L, g, feat_size)
        x = to_autocast(x)  # once: each linear map would keep a copy of its own
        scores: Optional[Tensor] = None  # (B, N, h * r)
        if self.qkv is not None:
            if torch.jit.is_scripting():
                q, k, v = self.qkv(x).chunk(3, dim=-1)
                kv = torch.stack([k, v], dim=2)
            else:
                q, kv = cpu.split_linear(self.qkv, x, (1, 2))
                kv = kv.unflatten(-1, (2, -1))  # (B, L, 2, D)
            if self.to_dynamic_projection is not None:
                # of global tokens too: to leave them out would copy the others
                if torch.jit.is_scripting():
                    scores = self.to_dynamic_projection(x)[:, g:]
                else:
                    scores = cpu.linear(self.to_dynamic_projection, x)[:, g:]
        else:
            assert self.query is not None and self.key is not None and self.value is not None
            grid = self._conv_grid(x, feat_size)
            q, kv = self.query(grid), torch.stack([self.key(grid), self.value(grid)], dim=2)
            if self.scores is not None:
                scores = self.scores(grid)
        kv = self.dual_ln_full(kv)
        d = q.shape[-1] // h
        q, kv = q.reshape(B, L, h, d), kv.reshape(B, L, 2, h, d)
        if scores is not None:
            scores = scores.transpose(1, 2).reshape(B, h, scores.shape[-1] // h, H * W)  # no -1: B may be 0
            scores = cpu.dense(scores)  # summarised in the same order as ever, to the last bit
        if g == 0:
            return q.reshape(B, H, W, h, d), q[:, :0], kv.reshape(B, H, W, 2, h, d), kv[:, :0], scores
        # split, not sliced: the gradients of two slices would be padded and added
        q_global, query = q.split([g, H * W], dim=1)
        own, pair = kv.split([g, H * W], dim=1)
        return query.reshape(B, H, W, h, d), q_global, pair.reshape(B, H, W, 2, h, d), own, scores

    def _additional(self, pair: Tensor, own: Tensor, scores: Optional[Tensor]) -> Optional[Tensor]:
        """(B, M, 2, h, d), keys and values that every local token sees: r summaries, then g global tokens."""
        if scores is None or self.dual_ln_dp is None:
            return own if self.num_global_tokens > 0 else None
        B, _, _, _, h, d = pair.shape
        sums = self._summarize(scores, pair)
        r = sums.shape[2]
        long = sums.permute(0, 2, 3, 1, 4).reshape(B, r, 2, h * d)
        return torch.cat([self.dual_ln_dp(long).reshape(B, r, 2, h, d), own], dim=1)

    def _summarize(self, scores: Tensor, pair: Tensor) -> Tensor:
        """(B, h, r, 2, d), the sums of keys and values that the scores weight."""
        sums, _ = summarize(scores, pair.flatten(1, 2))
        return sums

    def _conv_grid(self, x: Tensor, feat_size: Tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, C, H, W), what convolutional projections take."""
        return to_grid(x, feat_size)

    def _attend(self, query: Tensor, pair: Tensor, additional: Optional[Tensor]) -> Tensor:
        """The attention of local tokens; (B, H, W, h, d)."""
        if torch.jit.is_scripting():
            return self._attend_explicitly(query, pair, additional)
        else:
            if self.fused_attn and cpu.is_inactive_dropout(self.attn_drop):
                window = self._make_window()
                out, _ = attend(query, pair, window, additional, self.position_bias(), self.scale)
                return out
            return self._attend_explicitly(query, pair, additional)

    def _attend_explicitly(self, query: Tensor, pair: Tensor, additional: Optional[Tensor]) -> Tensor:
        """The attention of local tokens with its weights passed through `attn_drop`; (B, H, W, h, d)."""
        window = self._make_window()
        logits, values = tile_logits(query, pair, window, additional, self.position_bias(), self.scale)
        weights = self.attn_drop(to_dtype(logits.softmax(dim=-1), values.dtype))
        return merge_windows(torch.matmul(weights, values), (query.shape[1], query.shape[2]), window)

    def _make_window(self) -> Window:
        rows, cols, row_margin, col_margin = self._window  # TorchScript has no attributes of named tuples
        return Window(rows, cols, row_margin, col_margin)

    def _global_keys(self, out: Tensor, pair: Tensor) -> Tensor:
        """(B, N, n, h, d): local outputs, which are both keys and values, or local keys and values."""
        return out.flatten(1, 2).unsqueeze(2) if self.global_attention == 'post' else pair.flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, rank={self.rank}, '
            f'num_global_tokens={self.num_global_tokens}, rel_pos_bias={self.rel_pos_bias!r}, '
            f'global_attention={self.global_attention!r}'
        )
