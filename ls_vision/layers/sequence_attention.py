"""Bidirectional long-short attention over a sequence (Zhu et al., NeurIPS 2021, arXiv 2107.02192).

A sequence is a grid of one row: the operator is that of `LongShortAttention2d`.

Shapes: B batch, N tokens, g global tokens, C channels, h heads, d = C / h, r rank, M = g + r additional keys, w window
size.
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attend, check_padding_mask, without_padding
from ..ops.backends.composite import merge_windows, tile_logits
from ..ops.long_range import attend_globally, summarize
from ..ops.numerics import masked_logit, to_autocast, to_dtype
from ..ops.window import Window, square_window
from . import cpu
from .checks import check_at_least, check_heads, check_tokens
from .norm import DualLayerNorm


class LongShortAttention1d(nn.Module):
    """Attention to a window around each token and to r summaries of the whole sequence, in one softmax.

    Works on sequences of any length, with or without padding. The outputs of a padded sequence are those of the
    sequence alone. There are no positions: add them to the tokens. The parameter names are those of the released
    implementation.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            *,
            window_size: int = 8,
            rank: int = 32,
            conv_kernel_size: int = 0,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: C, channels of the tokens.
            num_heads: h.
            window_size: w, queries of a window, which see max(w // 2, 1) more tokens on each side; 0 attends to the
                summaries and global tokens alone.
            rank: r, number of summaries per head; 0 attends to the window and global tokens alone. With both 0 a token
                sees itself and the global tokens.
            conv_kernel_size: Odd width of a depthwise convolution of the values, one kernel per head and initialised to
                0, that is added to the output; 0 for none.
            attn_drop: Dropout rate of the attention weights of tokens.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is out of range or does not fit another.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_heads(dim, num_heads)
        check_at_least(0, window_size=window_size, rank=rank, conv_kernel_size=conv_kernel_size)
        if conv_kernel_size and conv_kernel_size % 2 == 0:
            raise ValueError(f'conv_kernel_size is {conv_kernel_size}, expected 0 (no convolution) or an odd number.')
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.rank = rank
        self.scale = (dim // num_heads) ** -0.5
        self.W_q, self.W_k, self.W_v = (nn.Linear(dim, dim, **dd) for _ in range(3))
        self.dconv_fc = nn.Linear(dim, num_heads * rank, **dd) if rank > 0 else None
        self.dual_ln_l = DualLayerNorm(dim, **dd)
        self.dual_ln_s = DualLayerNorm(dim, **dd)  # of summaries and global tokens
        self.conv: Optional[nn.Conv2d] = None
        if conv_kernel_size:
            self.conv = nn.Conv2d(
                num_heads, num_heads, (conv_kernel_size, 1), padding=(conv_kernel_size // 2, 0), groups=num_heads,
                bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.W_o = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what is not initialised by the submodules themselves."""
        if self.conv is not None:
            nn.init.zeros_(self.conv.weight)

    def forward(
            self,
            x: Tensor,
            key_padding_mask: Optional[Tensor] = None,
            global_tokens: Optional[Tensor] = None,
    ) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """
        Args:
            x: (B, N, C), normalised.
            key_padding_mask: (B, N) bool, True where a token is PADDING, as in `torch.nn.MultiheadAttention` and the
                opposite of `attention_mask` in transformers. Rows of padding alone are allowed.
            global_tokens: (B, g, C), seen by all tokens and seeing all; not normalised. None for none.

        Returns:
            (B, N, C), the output bias where a token is padding; with `global_tokens` a pair of that and (B, g, C).

        Raises:
            ValueError: The shape of an argument or the meaning of the mask does not fit, or there is nothing to attend
                to: window_size and rank are 0 and there are no global tokens.
        """
        check_tokens('x', x, self.dim)
        check_padding_mask(key_padding_mask, x, x.shape[:2])
        if global_tokens is not None:
            check_tokens('global_tokens', global_tokens, self.dim, x.shape[0])
        elif self.window_size == 0 and self.rank == 0:
            raise ValueError('window_size and rank are 0 and there are no global tokens: nothing to attend to.')
        padding = key_padding_mask
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0.)  # whatever is there, NaN included
        query, pair, scores = self._project(to_autocast(x))
        if padding is not None:
            # a sequence of padding alone is summarised as 0, and the convolution sees no value of padding
            pair = pair.masked_fill(padding[:, None, :, None, None, None], 0.)
        q_global, own = self._project_global(global_tokens)
        out = self._attend(query, pair, self._additional(pair, own, scores, padding), padding)  # (B, N, h, d)
        out_global = None
        if q_global is not None and own is not None:
            out_global, _ = attend_globally(q_global, own, out.unsqueeze(2), self.scale, padding=padding)
        if self.conv is not None:
            out = out + self.conv(pair[:, 0, :, 1].transpose(1, 2)).transpose(1, 2)
        y = self._output(out)
        return y if out_global is None else (y, self._output(out_global))

    def _project(self, x: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """From tokens (B, N, C) to everything that attends and is attended to, as a grid of one row.

        Returns:
            query: (B, 1, N, h, d).
            pair: (B, 1, N, 2, h, d), normalised keys and values. The window takes it as it is: the first of the
                gradients that autograd adds up for it must be no view, or their sum would be a third tensor.
            scores: (B, h, r, N); None with rank 0.
        """
        h = self.num_heads
        q = cpu.linear(self.W_q, x).unflatten(-1, (h, -1)).unsqueeze(1)
        kv = self.dual_ln_l(keys_and_values(self.W_k, self.W_v, x)).unflatten(-1, (h, -1)).unsqueeze(1)
        scores = None
        if self.rank > 0 and self.dconv_fc is not None:
            scores = cpu.linear(self.dconv_fc, x).transpose(1, 2).unflatten(1, (h, -1))
        return q, kv, scores

    def _project_global(self, x: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Queries (B, g, h, d), and keys and values (B, g, 2, h, d), not normalised, of (B, g, C)."""
        if x is None:
            return None, None
        x, h = to_autocast(x), self.num_heads
        return self.W_q(x).unflatten(-1, (h, -1)), keys_and_values(self.W_k, self.W_v, x).unflatten(-1, (h, -1))

    def _additional(
            self,
            pair: Tensor,
            own: Optional[Tensor],
            scores: Optional[Tensor],
            padding: Optional[Tensor],
    ) -> Optional[Tensor]:
        """(B, M, 2, h, d), keys and values that every token sees: g global tokens, then r summaries."""
        h, d = pair.shape[4:]
        parts = [] if own is None else [own]
        if scores is not None:
            if padding is not None:
                scores = scores.masked_fill(padding[:, None, None], masked_logit(scores.dtype))
            sums, _ = summarize(scores, pair.flatten(1, 2))  # (B, h, r, 2, d)
            parts.append(sums.permute(0, 2, 3, 1, 4))  # (B, r, 2, h, d)
        if not parts:
            return None
        joined = torch.cat(parts, dim=1).flatten(3)  # (B, M, 2, C)
        return self.dual_ln_s(joined).unflatten(-1, (h, d))

    def _attend(
            self,
            query: Tensor,
            pair: Tensor,
            additional: Optional[Tensor],
            padding: Optional[Tensor],
    ) -> Tensor:
        """(B, N, h, d), the attention of tokens to their windows and the additional keys."""
        padding = None if padding is None else padding.unsqueeze(1)
        if cpu.is_inactive_dropout(self.attn_drop):
            out, _ = attend(query, pair, self._window(), additional, None, self.scale, padding=padding)
        else:
            logits, values = tile_logits(query, pair, self._window(), additional, None, self.scale, padding)
            weights = self.attn_drop(to_dtype(logits.softmax(dim=-1), values.dtype))
            out = merge_windows(weights @ values, (query.shape[1], query.shape[2]), self._window())
            out = without_padding(out, padding)
        return out.squeeze(1)

    def _window(self) -> Window:
        """The window on a grid of one row."""
        if self.window_size == 0:
            # without summaries a token sees itself besides the global tokens, as in the released code
            return square_window(0) if self.rank > 0 else Window(1, 1, 0, 0)
        return Window(1, self.window_size, 0, square_window(self.window_size).col_margin)

    def _output(self, x: Tensor) -> Tensor:
        """(B, N, h, d) -> (B, N, C)."""
        return self.proj_drop(cpu.linear(self.W_o, x.flatten(2)))

    def extra_repr(self) -> str:
        return f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, rank={self.rank}'


def keys_and_values(to_key: nn.Linear, to_value: nn.Linear, x: Tensor) -> Tensor:
    """Both linear maps of the same tokens by one product: (B, N, C) -> (B, N, 2, D)."""
    if not (cpu.is_unmodified(to_key, nn.Linear) and cpu.is_unmodified(to_value, nn.Linear)):
        return torch.stack([to_key(x), to_value(x)], dim=2)  # adapters, quantised maps, hooks
    bias = None if to_key.bias is None or to_value.bias is None else torch.cat([to_key.bias, to_value.bias])
    return F.linear(x, torch.cat([to_key.weight, to_value.weight]), bias).unflatten(-1, (2, -1))
