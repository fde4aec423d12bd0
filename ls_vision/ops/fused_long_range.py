"""The long-range half by Triton's kernels, as operators that autograd and compilers understand.

Unlike those of `long_range`, the operator of summaries takes scores, not weights: the softmax is part of the kernel.
Both keep the softmax's statistics, from which the backward pass makes the weights again. Their FLOPs are counted there.

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank; g global queries, m own
keys of the global tokens.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import double_backward
from .backends.triton import long_range as kernels
from .plain_long_range import attend_plainly, summarize_plainly

# ---- summaries -------------------------------------------------------------------------------------------------------

@torch.library.custom_op('ls_vision::fused_summarize', mutates_args=())
def _summarize(scores: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """(B, h, r, N) scores and (B, N, n, h, d) tokens -> sums (B, r, n, h, d), statistics (2, B, r, h) float32."""
    return kernels.summarize(scores, tokens)


@_summarize.register_fake
def _(scores, tokens):
    B, h, r, _ = scores.shape
    return (
        tokens.new_empty(B, r, tokens.shape[2], h, tokens.shape[4]),
        tokens.new_empty((2, B, r, h), dtype=torch.float32))


@torch.library.custom_op('ls_vision::fused_summarize_backward', mutates_args=())
def _summarize_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        scores: Tensor,
        tokens: Tensor,
        sums: Tensor,
        statistics: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Gradients of scores and tokens, from those of the sums and of the log-sum-exp, (B, r, h) or None."""
    return kernels.summarize_backward(grad, grad_lse, scores, tokens, sums, statistics)


@_summarize_backward.register_fake
def _(grad, grad_lse, scores, tokens, sums, statistics):
    B, h, r, N = scores.shape
    return scores.new_empty(B, N, h, r).permute(0, 2, 3, 1), tokens.new_empty(tokens.shape)


def _setup_summarize(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _summarize_plainly(scores: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Sums (B, r, n, h, d) and the log-sum-exp (B, r, h)."""
    sums, _ = summarize_plainly(scores, tokens, False)  # (B, h, r, n, d)
    return sums.permute(0, 2, 3, 1, 4), scores.float().logsumexp(-1).transpose(1, 2)


def _differentiate_summarize(ctx, grad: Optional[Tensor], grad_statistics: Optional[Tensor]):
    scores, tokens, sums, statistics = ctx.saved_tensors
    grad_lse = None if grad_statistics is None else grad_statistics[1]  # of both parts that of their sum
    if grad is None and grad_lse is None:
        return None, None
    if torch.is_grad_enabled():  # create_graph=True
        return tuple(double_backward.gradients(_summarize_plainly, (scores, tokens), (grad, grad_lse)))
    grad = torch.zeros_like(sums) if grad is None else grad
    return torch.ops.ls_vision.fused_summarize_backward(grad, grad_lse, scores, tokens, sums, statistics)


_summarize.register_autograd(_differentiate_summarize, setup_context=_setup_summarize)


# ---- global tokens ---------------------------------------------------------------------------------------------------

@torch.library.custom_op('ls_vision::fused_global_attention', mutates_args=())
def _attend(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tuple[Tensor, Tensor]:
    """(B, g, h, d) queries, (B, m, 2, h, d) own keys and values, (B, N, n, h, d) tokens -> out (B, g, h, d), statistics
    (2, B, g, h) float32."""
    return kernels.attend(query, own, tokens, scale)


@_attend.register_fake
def _(query, own, tokens, scale):
    B, g, h, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((2, B, g, h), dtype=torch.float32)


@torch.library.custom_op('ls_vision::fused_global_attention_backward', mutates_args=())
def _attend_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
        out: Tensor,
        statistics: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, own keys and values, and tokens; that of the log-sum-exp is (B, g, h) or None."""
    return kernels.attend_backward(grad, grad_lse, query, own, tokens, scale, out, statistics)


@_attend_backward.register_fake
def _(grad, grad_lse, query, own, tokens, scale, out, statistics):
    return tuple(t.new_empty(t.shape) for t in (query, own, tokens))


def _setup_attend(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate_attend(ctx, grad: Optional[Tensor], grad_statistics: Optional[Tensor]):
    *tensors, out, statistics = ctx.saved_tensors
    grad_lse = None if grad_statistics is None else grad_statistics[1]
    if grad is None and grad_lse is None:
        return (None,) * 4
    if torch.is_grad_enabled():  # create_graph=True
        def function(query, own, tokens):
            out, lse = attend_plainly(query, own, tokens, ctx.scale, True)
            return out, lse.transpose(1, 2)
        return (*double_backward.gradients(function, tensors, (grad, grad_lse)), None)
    grad = torch.zeros_like(out) if grad is None else grad
    return (*torch.ops.ls_vision.fused_global_attention_backward(
        grad, grad_lse, *tensors, ctx.scale, out, statistics), None)


_attend.register_autograd(_differentiate_attend, setup_context=_setup_attend)
