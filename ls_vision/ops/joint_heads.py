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


def float16_scale() -> float:
    """Factor on float16 weights, whose digits end at 2^-24.

    Those of a million tokens, 2^-20, become 2^-15; weighted values may reach 2^11. A function, for TorchScript.
    """
    return 32.


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


def attend(
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
        with_lse: bool,
) -> Tuple[Tensor, Tensor]:
    """Attention of the global tokens.

    Args:
        query: (B, g, h, d).
        own: (B, m, 2, h, d).
        tokens: (B, N, n, h, d), n 1 or 2.
        scale: Factor on the products.
        with_lse: Whether the log-sum-exp is needed.

    Returns:
        out: (B, g, h, d).
        lse: (B, h, g) in the precision of statistics; no elements unless `with_lse`.
    """
    B, g, h, d = query.shape
    logits = _logits(_blocks(query), own, tokens, scale)
    weights = _scaled(logits.softmax(-1), query.dtype).split([own.shape[1], tokens.shape[1]], dim=-1)
    sums = torch.baddbmm(torch.bmm(weights[0], own[:, :, -1].flatten(2)), weights[1], tokens[:, :, -1].flatten(2))
    out = _diagonal(sums, (h, g), (1, h, d)).squeeze(3).transpose(1, 2).contiguous()  # from (B, h, g, d)
    lse = logits.logsumexp(-1).view(B, h, g) if with_lse else logits.new_empty(0)
    return out / float16_scale() if query.dtype == torch.float16 else out, lse


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
    sizes = [own.shape[1], tokens.shape[1]]
    ds = to_dtype((dp - delta).mul_(p).mul_(scale), dtype)
    parts = ds.split(sizes, dim=-1)
    keys = torch.baddbmm(torch.bmm(parts[0], own[:, :, 0].flatten(2)), parts[1], tokens[:, :, 0].flatten(2))
    grad_query = _diagonal(keys, (h, g), (1, h, d)).squeeze(3).transpose(1, 2).contiguous()

    if dtype == torch.float16:
        do = do / float16_scale()
    both = torch.cat([ds, _scaled(p, dtype)], dim=1).transpose(1, 2).split(sizes, dim=1)  # (B, tokens, 2 * h * g)
    grad_own, grad_tokens = (
        torch.bmm(part, _beside(q, do, kinds)).view(B, -1, kinds, h, d)
        for part, kinds in zip(both, (2, tokens.shape[2])))
    return grad_query, grad_own, grad_tokens


def _beside(q: Tensor, do: Tensor, kinds: int) -> Tensor:
    """(B, 2 * h * g, kinds * h * d): what gradients of logits and weights are multiplied by.

    Gradients of keys and values come to lie side by side, or are added where the two are of one kind.
    """
    if kinds == 1:
        return torch.cat([q, do], dim=1)
    B, rows, cols = q.shape
    out = q.new_zeros(B, 2, rows, 2, cols)
    out[:, 0, :, 0], out[:, 1, :, 1] = q, do
    return out.view(B, 2 * rows, 2 * cols)


def _scaled(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in that precision, in float16 times `float16_scale()`."""
    return to_dtype(weights * float16_scale() if dtype == torch.float16 else weights, dtype)


def _logits(q: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """(B, h * g, m + N), of block-diagonal queries (B, h * g, h * d)."""
    return torch.cat([_product(q, x[:, :, 0].flatten(2).transpose(1, 2)) for x in (own, tokens)], dim=-1).mul_(scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of statistics, with operands as they are where the device can."""
    dtype = statistics_dtype(a)
    if a.dtype == dtype:
        return torch.bmm(a, b)
    if a.device.type in ('cuda', 'meta'):
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


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
