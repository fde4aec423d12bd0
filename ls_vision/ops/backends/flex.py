"""Long-short attention by PyTorch's FlexAttention: a block mask of windows and a score function for the bias.

Tokens are put in the order of their windows, so that few blocks of the mask are partly empty. The additional keys come
first among the keys.

Shapes: B batch, H x W grid, N = H * W, h heads, d head width, M additional keys.
"""
import functools
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..numerics import masked_logit
from ..window import Window, key_size

_SMALLEST_HEAD = 16


def why_not(query: Tensor, window: Window, with_grad: bool, with_lse: bool) -> Optional[str]:
    """The reason why FlexAttention can't compute this here, None where it can."""
    if query.dtype == torch.float64:
        return 'FlexAttention takes 16 or 32 bits, the query has torch.float64'
    if query.is_cuda:
        if query.shape[-1] < _SMALLEST_HEAD:
            return f'FlexAttention on a GPU takes head widths of {_SMALLEST_HEAD} or more, not {query.shape[-1]}'
        return None
    if query.device.type != 'cpu':
        return f'FlexAttention does not run on {query.device.type}'
    if with_grad:
        return 'FlexAttention has no backward pass on the CPU'
    if with_lse:
        return 'FlexAttention has no log-sum-exp on the CPU'
    return None


def flex_forward(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        with_lse: bool,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`ls_vision.ops.attention.attend`, which describes arguments and results; autograd differentiates it."""
    B, H, W, h, d = query.shape
    M = 0 if additional is None else additional.shape[1]
    pattern = _pattern((H, W), window, M, query.device)
    q = query.reshape(B, H * W, h, d)[:, pattern.order].transpose(1, 2)  # (B, h, N, d)
    keys = pair.reshape(B, H * W, 2, h, d)[:, pattern.order]
    if additional is not None:
        keys = torch.cat([additional, keys], dim=1)  # (B, M + N, 2, h, d)
    k, v = keys.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, M + N, d)
    score = None if bias is None else _bias_score(bias.to(query.dtype), pattern, window, M)
    if padding is not None:
        score = _padding_score(score, padding.reshape(B, H * W)[:, pattern.order], M)
    result = _flex_attention()(q, k, v, score_mod=score, block_mask=pattern.mask, scale=scale, return_lse=with_lse)
    out, lse = result if with_lse else (result, query.new_empty(0))
    out = out.transpose(1, 2)[:, pattern.inverse].reshape(B, H, W, h, d)
    return out, lse[..., pattern.inverse].unflatten(-1, (H, W)) if with_lse else lse


class Pattern(NamedTuple):
    """The order of tokens on a grid, window by window, and which key each query sees."""
    order: Tensor
    inverse: Tensor
    row: Tensor
    """(N,) of each token in that order, as is `col`."""
    col: Tensor
    mask: Any


@functools.lru_cache(maxsize=32)
def _pattern(feat_size: Tuple[int, int], window: Window, num_additional: int, device: torch.device) -> Pattern:
    from torch.nn.attention.flex_attention import create_block_mask
    H, W = feat_size
    index = torch.arange(H * W, device=device).view(H, W)
    order = torch.cat([t.flatten() for rows in index.split(window.rows, 0) for t in rows.split(window.cols, 1)])
    row, col = order // W, order % W

    def sees(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key_row, key_col = _position(row, col, window, i, (j - num_additional).clamp(min=0))
        return (j < num_additional) | _is_inside(key_row, key_col, window)

    mask = create_block_mask(sees, None, None, H * W, num_additional + H * W, device=device.type)
    return Pattern(order, order.argsort(), row, col, mask)


def _position(row: Tensor, col: Tensor, window: Window, query: Tensor, key: Tensor) -> Tuple[Tensor, Tensor]:
    """Row and column of a key among those of a query's window; both by their numbers in the order of windows."""
    return (
        row[key] - row[query] // window.rows * window.rows + window.row_margin,
        col[key] - col[query] // window.cols * window.cols + window.col_margin)


def _is_inside(key_row: Tensor, key_col: Tensor, window: Window) -> Tensor:
    rows, cols = key_size(window)
    return (key_row >= 0) & (key_row < rows) & (key_col >= 0) & (key_col < cols)


def _bias_score(bias: Tensor, pattern: Pattern, window: Window, num_additional: int) -> Any:
    """Adds the (h, Q, K) bias to the scores of the window's keys."""
    row, col = pattern.row, pattern.col

    def add_bias(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key_row, key_col = _position(row, col, window, i, (j - num_additional).clamp(min=0))
        inside = (j >= num_additional) & _is_inside(key_row, key_col, window)
        query = row[i] % window.rows * window.cols + col[i] % window.cols
        key = torch.where(inside, key_row * key_size(window)[1] + key_col, 0)
        return score + torch.where(inside, bias[head, query, key], 0.)

    return add_bias


def _padding_score(add_bias: Any, padding: Tensor, num_additional: int) -> Any:
    """Takes the weight from the window's keys that are padding, (B, N) in the order of windows."""

    def mask(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        masked = (j >= num_additional) & padding[b, (j - num_additional).clamp(min=0)]
        score = score if add_bias is None else add_bias(score, b, head, i, j)
        return torch.where(masked, masked_logit(torch.float32), score)

    return mask


@functools.cache
def _flex_attention() -> Any:
    """FlexAttention as a compiled function; without compilation it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)
