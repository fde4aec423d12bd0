"""The long-range half of long-short attention: summaries of an image, and what its global tokens attend to.

Both are sums over all tokens, weighted by a softmax. With the log-sum-exp of each softmax, results of parts of the
tokens merge into that of all (`merge_parts`).

They are operators of their own: products over two batch dimensions would copy all tokens, head by head, and autograd
would keep the copies for the backward pass. On the CPU they take as many images at a time as fit a cache, on GPUs they
are fused Triton kernels (`fused_long_range`), on other devices all heads are taken at once (`joint_heads`).

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank; g global queries,
m own keys of the global tokens.
"""
import itertools
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import double_backward, fused_long_range, joint_heads  # noqa: F401  (registers operators)
from .backends import takes_kernels
from .calls import is_followed
from .chunks import CHUNK_ELEMENTS, image_chunks, slices
from .numerics import at_least_float32, statistics_dtype, to_dtype
from .plain_long_range import (
    attend_plainly,
    global_logits,
    summarize_plainly,
    sums_by_head,
    token_weights,
    weighted_sums,
)

SHORTEST_IN_PLACE = 1024  # tokens; the products of many short sequences are faster on copies, all in one call


def merge_parts(parts: Sequence[Tuple[Tensor, Tensor]]) -> Tuple[Tensor, Tensor]:
    """Merges softmax-weighted sums over parts of the tokens into the sum over all of them.

    Args:
        parts: (sum, log-sum-exp) of each part; the log-sum-exps have the sums' shape but for the last dimension.

    Returns:
        The sum and its log-sum-exp.
    """
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    total = sum(out * (part_lse - lse).exp().unsqueeze(-1).to(out.dtype) for out, part_lse in parts)
    return total, lse  # type: ignore[return-value]


# ---- summaries -------------------------------------------------------------------------------------------------------

def summarize(scores: Tensor, tokens: Tensor, with_lse: bool = False) -> Tuple[Tensor, Tensor]:
    """The dynamic projection of tokens (paper, equation 3): for each head r weighted sums of them.

    Args:
        scores: (B, h, r, N); a softmax over the tokens turns them into weights.
        tokens: (B, N, n, h, d), any strides.
        with_lse: Whether the log-sum-exp is needed.

    Returns:
        sums: (B, h, r, n, d).
        lse: (B, h, r), the log-sum-exp of the scores; undefined unless `with_lse`.
    """
    if torch.jit.is_scripting():
        return summarize_plainly(scores, tokens, with_lse)
    else:
        if is_followed(scores, tokens):
            return summarize_plainly(scores, tokens, with_lse)
        if takes_kernels(tokens, scores.shape[2], [scores], False):
            sums, statistics = torch.ops.ls_vision.fused_summarize(scores, tokens)  # (B, r, n, h, d), (2, B, r, h)
            return sums.permute(0, 3, 1, 2, 4), statistics.sum(0).transpose(1, 2) if with_lse else scores
        sums = sums_by_head(torch.ops.ls_vision.summarize(token_weights(scores), tokens))
        return sums, scores.logsumexp(dim=-1) if with_lse else scores


@torch.library.custom_op('ls_vision::summarize', mutates_args=())
def _summarize(weights: Tensor, tokens: Tensor) -> Tensor:
    """(B, h, r, N) weights and (B, N, n, h, d) tokens -> (B, n, h, r, d)."""
    (B, h, r, _), (n, d) = weights.shape, (tokens.shape[2], tokens.shape[4])
    if tokens.device.type != 'cpu':
        return joint_heads.summarize(weights, tokens)
    if _are_multiplied_in_place(weights):
        sums = tokens.new_empty(n, h, B, r, d)
        for head in range(h):
            for kind in range(n):
                torch.bmm(weights[:, head], tokens[:, :, kind, head], out=sums[kind, head])
        return sums.permute(2, 0, 1, 3, 4).contiguous()
    weights, x = weights.contiguous(), tokens.permute(0, 2, 3, 1, 4)  # (B, n, h, N, d)
    out = tokens.new_empty(B, n, h, r, d)
    for i in image_chunks(B, tokens.shape[1] * h * d):
        for kind in range(n):
            out[i, kind] = weights[i] @ x[i, kind]
    return out


def _are_multiplied_in_place(weights: Tensor) -> bool:
    """Whether products read long sequences, token by token, where they lie: the heads of an image at a time."""
    return weights.stride(-1) != 1 and weights.shape[-1] >= SHORTEST_IN_PLACE


@_summarize.register_fake
def _(weights, tokens):
    return tokens.new_empty(tokens.shape[0], tokens.shape[2], weights.shape[1], weights.shape[2], tokens.shape[4])


@torch.library.custom_op('ls_vision::summarize_backward', mutates_args=())
def _summarize_backward(grad: Tensor, weights: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of the weights, which lie in memory as these do, and of the tokens."""
    (B, h, r, N), (n, d) = weights.shape, (tokens.shape[2], tokens.shape[4])
    if tokens.device.type != 'cpu':
        grad_weights, grad_tokens = joint_heads.summarize_backward(grad, weights, tokens)
        return _laid_out_as(weights, grad_weights), grad_tokens
    grad_tokens = tokens.new_empty(tokens.shape)
    both = grad.permute(0, 2, 3, 1, 4).reshape(B, h, r, n * d)  # keys and values by one product
    if _are_multiplied_in_place(weights):
        grad_weights = torch.empty_like(weights)
        step = min(N, max(CHUNK_ELEMENTS // (n * h * d), SHORTEST_IN_PLACE))
        buffer = tokens.new_empty(h, step, n * d)  # one for all: new memory costs more than a product
        for i, part in itertools.product(range(B), slices(N, step)):
            by_head = buffer[:, :part.stop - part.start]
            _by_token(by_head, n).copy_(tokens[i, part])
            for head in range(h):
                torch.mm(by_head[head], both[i, head].t(), out=grad_weights[i, head, :, part].t())
                torch.mm(weights[i, head, :, part].t(), both[i, head], out=by_head[head])
            grad_tokens[i, part] = _by_token(by_head, n)
        return grad_weights, grad_tokens
    x = tokens.permute(0, 2, 3, 4, 1)  # (B, n, h, d, N)
    grad = grad.contiguous()  # (B, n, h, r, d)
    layout, weights = weights, weights.contiguous()
    grad_weights = weights.new_empty(weights.shape)
    for i in image_chunks(B, N * n * h * d):
        out = grad_weights[i].flatten(0, 1)  # (images * h, r, N), as below
        for kind in range(n):
            torch.baddbmm(out, grad[i, kind].flatten(0, 1), x[i, kind].flatten(0, 1), beta=float(kind > 0), out=out)
        grad_tokens[i] = _by_token(weights[i].transpose(2, 3) @ both[i], n)
    return _laid_out_as(layout, grad_weights), grad_tokens


def _by_token(x: Tensor, kinds: int) -> Tensor:
    """View (..., N, n, h, d) of (..., h, N, n * d)."""
    return x.unflatten(-1, (kinds, -1)).movedim(-4, -2)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides of x: the softmax in front takes its gradient in the order of its result."""
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


@_summarize_backward.register_fake
def _(grad, weights, tokens):
    return torch.empty_like(weights), tokens.new_empty(tokens.shape)


def _setup_summarize(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_summarize(ctx, grad: Tensor):
    if torch.is_grad_enabled():  # create_graph=True
        return tuple(double_backward.gradients(weighted_sums, ctx.saved_tensors, (grad,)))
    return torch.ops.ls_vision.summarize_backward(grad, *ctx.saved_tensors)


_summarize.register_autograd(_differentiate_summarize, setup_context=_setup_summarize)


@register_flop_formula([torch.ops.ls_vision.summarize, torch.ops.ls_vision.fused_summarize])
def _summarize_flops(weights, tokens, *args, **kwargs) -> int:
    B, h, r, N = weights
    return 2 * B * h * r * N * tokens[2] * tokens[4]


@register_flop_formula(torch.ops.ls_vision.summarize_backward)
def _summarize_backward_flops(grad, weights, tokens, *args, **kwargs) -> int:
    return 2 * _summarize_flops(weights, tokens)


@register_flop_formula(torch.ops.ls_vision.fused_summarize_backward)
def _fused_summarize_backward_flops(grad, grad_lse, scores, tokens, *args, **kwargs) -> int:
    return 2 * _summarize_flops(scores, tokens)


# ---- global tokens ---------------------------------------------------------------------------------------------------

def attend_globally(
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
        with_lse: bool = False,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """softmax(scale * q [own k, k]^T) [own v, v]: attention of the global tokens to themselves and to all tokens.

    Args:
        query: (B, g, h, d).
        own: (B, m, 2, h, d), keys and values of the global tokens, any strides.
        tokens: (B, N, n, h, d), keys and values of the others, any strides; n 1 where they are the same.
        scale: Factor on the products.
        with_lse: Whether the log-sum-exp is needed.
        padding: (B, N) bool, true for those of the tokens that nobody attends to; None for none.

    Returns:
        out: (B, g, h, d).
        lse: (B, h, g), the log-sum-exp of each query's logits; undefined unless `with_lse`.
    """
    if torch.jit.is_scripting():
        return attend_plainly(query, own, tokens, scale, with_lse, padding)
    else:
        if padding is not None or is_followed(query, own, tokens):
            return attend_plainly(query, own, tokens, scale, with_lse, padding)
        if takes_kernels(tokens, query.shape[1], [query, own], True):
            out, statistics = torch.ops.ls_vision.fused_global_attention(query, own, tokens, scale)
            return out, statistics.sum(0).transpose(1, 2) if with_lse else query.new_empty(0)
        return torch.ops.ls_vision.global_attention(query, own, tokens, scale, with_lse)


def global_weights(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """(B, h, g, m + N), the weights of `attend_globally`."""
    return to_dtype(global_logits(query, own, tokens, scale).softmax(dim=-1), query.dtype)


@torch.library.custom_op('ls_vision::global_attention', mutates_args=())
def _attend(query: Tensor, own: Tensor, tokens: Tensor, scale: float, with_lse: bool) -> Tuple[Tensor, Tensor]:
    (B, g, h, _), m = query.shape, own.shape[1]
    if query.device.type != 'cpu':
        return joint_heads.attend(query, own, tokens, scale, with_lse)
    out = query.new_empty(query.shape)
    lse = query.new_empty((B, h, g) if with_lse else (0,), dtype=statistics_dtype(query))
    for i in image_chunks(B, tokens.shape[1] * h * tokens.shape[4]):
        logits = _chunk_logits(_heads(query, i), _kinds(own, i)[0], _kinds(tokens, i)[0], scale)
        if with_lse:
            lse[i] = logits.logsumexp(-1)
        p_own, p_tokens = logits.softmax(dim=-1).split([m, tokens.shape[1]], dim=-1)
        _heads_view(out, i).copy_(p_own @ _kinds(own, i)[1] + p_tokens @ _kinds(tokens, i)[-1])
    return out, lse


@_attend.register_fake
def _(query, own, tokens, scale, with_lse):
    B, g, h, _ = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty((B, h, g) if with_lse else (0,), dtype=statistics_dtype(query)))


@torch.library.custom_op('ls_vision::global_attention_backward', mutates_args=())
def _attend_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, own keys and values, and tokens."""
    if query.device.type != 'cpu':
        return joint_heads.attend_backward(grad, grad_lse, query, own, tokens, scale)
    grad_q, grad_own, grad_tokens = (t.new_empty(t.shape) for t in (query, own, tokens))
    sizes = [own.shape[1], tokens.shape[1]]
    for i in image_chunks(tokens.shape[0], tokens.shape[1] * query.shape[2] * query.shape[3]):
        q, do = _heads(query, i), _heads(grad, i)
        parts = [_kinds(own, i), _kinds(tokens, i)]  # of both, keys first and values last
        p = _chunk_logits(q, parts[0][0], parts[1][0], scale).softmax(dim=-1)
        dp = torch.cat([do @ part[-1].transpose(-2, -1) for part in parts], dim=-1)
        delta = (dp * p).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[i].unsqueeze(-1)
        ds = (scale * p * (dp - delta)).split(sizes, dim=-1)
        _heads_view(grad_q, i).copy_(ds[0] @ parts[0][0] + ds[1] @ parts[1][0])
        for target, d_logits, weights in zip((grad_own, grad_tokens), ds, p.split(sizes, dim=-1)):
            grad_k, grad_v = d_logits.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ do
            if target.shape[2] == 1:
                _heads_view(target[:, :, 0], i).copy_(grad_k.add_(grad_v))
            else:
                _heads_view(target[:, :, 0], i).copy_(grad_k)
                _heads_view(target[:, :, 1], i).copy_(grad_v)
    return grad_q, grad_own, grad_tokens


@_attend_backward.register_fake
def _(grad, grad_lse, query, own, tokens, scale):
    return tuple(t.new_empty(t.shape) for t in (query, own, tokens))


def _heads_view(x: Tensor, images: slice) -> Tensor:
    """(B, tokens, h, d) -> (images, h, tokens, d)."""
    return x[images].transpose(1, 2)


def _heads(x: Tensor, images: slice) -> Tensor:
    """The same in the precision of the statistics."""
    return at_least_float32(_heads_view(x, images))


def _kinds(x: Tensor, images: slice) -> List[Tensor]:
    """(B, tokens, n, h, d) -> n times (images, h, tokens, d), in the precision of the statistics."""
    return [_heads(kind, images) for kind in x.unbind(2)]


def _chunk_logits(q: Tensor, own: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(images, h, g, d) queries and (images, h, tokens, d) keys -> (images, h, g, all tokens)."""
    return torch.cat([q @ k.transpose(-2, -1) for k in (own, keys)], dim=-1).mul_(scale)


def _setup_attend(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.with_lse = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_attend(ctx, grad: Optional[Tensor], grad_lse: Optional[Tensor]):
    grad_lse = grad_lse if ctx.with_lse else None
    if grad is None and grad_lse is None:
        return (None,) * 5
    if torch.is_grad_enabled():  # create_graph=True
        def function(query, own, tokens):
            return attend_plainly(query, own, tokens, ctx.scale, grad_lse is not None)
        return (*double_backward.gradients(function, ctx.saved_tensors, (grad, grad_lse)), None, None)
    grad = torch.zeros_like(ctx.saved_tensors[0]) if grad is None else grad
    return (
        *torch.ops.ls_vision.global_attention_backward(grad, grad_lse, *ctx.saved_tensors, ctx.scale), None, None)


_attend.register_autograd(_differentiate_attend, setup_context=_setup_attend)


@register_flop_formula([torch.ops.ls_vision.global_attention, torch.ops.ls_vision.fused_global_attention])
def _attend_flops(query, own, tokens, *args, **kwargs) -> int:
    B, g, h, d = query
    return 4 * B * g * (own[1] + tokens[1]) * h * d


@register_flop_formula([
    torch.ops.ls_vision.global_attention_backward, torch.ops.ls_vision.fused_global_attention_backward])
def _attend_backward_flops(grad, grad_lse, query, own, tokens, *args, **kwargs) -> int:
    return _attend_flops(query, own, tokens) * 5 // 2
