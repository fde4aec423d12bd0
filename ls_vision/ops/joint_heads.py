"""Summaries and global attention by products of all heads at once, for GPUs: tokens are read where they are.

A product over two batch dimensions, images and heads, copies all tokens head by head first, and a cast to float32
copies them again: at batch 64 these copies took more time than the window attention. Here the small operand becomes
block-diagonal, a row for each head and rank or query with zeros in all other heads' channels. One batched product with
the tokens as they lie, (B, N, n * h * d), then holds what is wanted in the blocks of its diagonal. It makes h times as
many multiplications as are needed, of which a GPU has enough while it reads the tokens.

Half precision is multiplied as it is and summed in float32. Weights are scaled by a power of two on the way to float16,
in which those of a million tokens would lose their digits.

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank; g global queries,
m own keys of the global tokens.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .numerics import statistics_dtype, to_dtype

# Of float16 weights, whose digits end at 2^-24. Those of a million tokens, 2^-20, become 2^-15; values may reach 2^11.
FLOAT16_SCALE = 32.


def weight_scale(dtype: torch.dtype) -> float:
    """Factor on softmax weights in that precision, to be taken back from their products."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.


def summarize(weights: Tensor, tokens: Tensor) -> Tensor:
    """(B, h, r, N) weights and (B, N, n, h, d) tokens -> (B, n, h, r, d)."""
    (_, h, r, _), (n, d) = weights.shape, (tokens.shape[2], tokens.shape[4])
    sums = torch.bmm(weights.flatten(1, 2), tokens.flatten(2))  # (B, h * r, n * h * d)
    return _diagonal(sums, (h, r), (n, h, d)).permute(0, 3, 1, 2, 4).contiguous()


def summarize_backward(grad: Tensor, weights: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of the weights and of the tokens, from that of the sums, (B, n, h, r, d)."""
    blocks = _block_diagonal(grad.permute(0, 2, 3, 1, 4))  # (B, h * r, n * h * d)
    grad_weights = torch.bmm(blocks, tokens.flatten(2).transpose(1, 2))
    grad_tokens = torch.bmm(weights.flatten(1, 2).transpose(1, 2), blocks)
    return grad_weights.view(weights.shape), grad_tokens.view(tokens.shape)


def attend(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tuple[Tensor, Tensor]:
    """Attention of the global tokens.

    Args:
        query: (B, g, h, d).
        own: (B, m, 2, h, d).
        tokens: (B, N, n, h, d), n 1 or 2.
        scale: Factor on the products.

    Returns:
        out: (B, g, h, d).
        lse: (B, h, g) in the precision of statistics.
    """
    B, g, h, d = query.shape
    logits = _logits(_blocks(query), own, tokens, scale)
    weights = _weights(logits, query.dtype).split([own.shape[1], tokens.shape[1]], dim=-1)
    sums = torch.baddbmm(torch.bmm(weights[0], own[:, :, -1].flatten(2)), weights[1], tokens[:, :, -1].flatten(2))
    out = _diagonal(sums, (h, g), (1, h, d)).squeeze(3) / weight_scale(query.dtype)  # (B, h, g, d)
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1).view(B, h, g)


def attend_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, own keys and values, and tokens, from those of `attend`'s results."""
    (B, g, h, d), dtype = query.shape, query.dtype
    q, do = _blocks(query), _blocks(grad)  # (B, h * g, h * d)
    logits = _logits(q, own, tokens, scale)
    p = logits.softmax(-1)
    dp = torch.cat([_product(do, x[:, :, -1].flatten(2).transpose(1, 2)) for x in (own, tokens)], dim=-1)
    delta = (dp * p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.reshape(B, h * g, 1)
    ds = to_dtype(scale * p * (dp - delta), dtype).split([own.shape[1], tokens.shape[1]], dim=-1)
    weights = _weights(logits, dtype).split([own.shape[1], tokens.shape[1]], dim=-1)

    keys = torch.baddbmm(torch.bmm(ds[0], own[:, :, 0].flatten(2)), ds[1], tokens[:, :, 0].flatten(2))
    grad_query = _diagonal(keys, (h, g), (1, h, d)).squeeze(3).transpose(1, 2).contiguous()
    do = do / weight_scale(dtype)
    grad_own, grad_tokens = (
        _gradients(d_logits, w, q, do, kinds).view(B, -1, kinds, h, d)
        for d_logits, w, kinds in zip(ds, weights, (2, tokens.shape[2])))
    return grad_query, grad_own, grad_tokens


def _gradients(d_logits: Tensor, weights: Tensor, q: Tensor, do: Tensor, kinds: int) -> Tensor:
    """(B, tokens, kinds * h * d): gradients of keys and of values side by side, or their sum for one kind.

    d_logits and weights are (B, h * g, tokens), q and do block-diagonal (B, h * g, h * d).
    """
    if kinds == 1:
        factors = torch.cat([q, do], dim=1)
    else:
        zeros = torch.zeros_like(q)
        factors = torch.cat([torch.cat([q, zeros], dim=2), torch.cat([zeros, do], dim=2)], dim=1)
    return torch.bmm(torch.cat([d_logits, weights], dim=1).transpose(1, 2), factors)


def _weights(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The softmax of logits in that precision, times `weight_scale`."""
    return to_dtype(logits.softmax(-1) * weight_scale(dtype), dtype)


def _logits(q: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """(B, h * g, m + N), of block-diagonal queries (B, h * g, h * d)."""
    return torch.cat([_product(q, x[:, :, 0].flatten(2).transpose(1, 2)) for x in (own, tokens)], dim=-1).mul_(scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of statistics, with operands as they are where the device can."""
    dtype = statistics_dtype(a)
    if a.dtype == dtype:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=dtype) if a.is_cuda else torch.bmm(a.to(dtype), b.to(dtype))


def _blocks(x: Tensor) -> Tensor:
    """(B, g, h, d) -> block-diagonal (B, h * g, h * d)."""
    return _block_diagonal(x.transpose(1, 2).unsqueeze(3))


def _block_diagonal(x: Tensor) -> Tensor:
    """(B, h, r, n, d) -> (B, h * r, n * h * d), zeros where the heads differ."""
    B, h, r, n, d = x.shape
    out = x.new_zeros(B, h, r, n, h, d)
    out.diagonal(dim1=1, dim2=4).copy_(x.permute(0, 2, 3, 4, 1))  # (B, r, n, d, h)
    return out.view(B, h * r, n * h * d)


def _diagonal(x: Tensor, rows: Tuple[int, int], cols: Tuple[int, int, int]) -> Tensor:
    """(B, h * r, n * h * d), of which the blocks of equal heads are kept -> view (B, h, r, n, d)."""
    return x.unflatten(2, cols).unflatten(1, rows).diagonal(dim1=1, dim2=4).permute(0, 4, 1, 2, 3)
