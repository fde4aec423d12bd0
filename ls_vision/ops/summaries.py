"""The weighted sums of keys and values that a dynamic projection makes of an image (paper, equation 3).

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank.
"""
from typing import Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .chunks import image_chunks


def summarize(weights: Tensor, tokens: Tensor) -> Tensor:
    """Sums of tokens, each head with its own r sets of weights.

    An operator of its own since products of more than one batch dimension would copy all tokens, head by head, and keep
    the copies for the backward pass.

    Args:
        weights: (B, h, r, N).
        tokens: (B, N, n, h, d), any strides.

    Returns:
        (B, n, h, r, d).
    """
    return torch.ops.ls_vision.summarize(weights, tokens)


@torch.library.custom_op('ls_vision::summarize', mutates_args=())
def _summarize(weights: Tensor, tokens: Tensor) -> Tensor:
    (B, h, r, _), (n, d) = weights.shape, (tokens.shape[2], tokens.shape[4])
    x = tokens.permute(0, 2, 3, 1, 4)  # (B, n, h, N, d)
    if x.device.type != 'cpu':
        return torch.matmul(weights.unsqueeze(1), x)
    out = tokens.new_empty(B, n, h, r, d)
    for i in image_chunks(B, tokens[0, :, 0].numel()):
        for kind in range(n):
            out[i, kind] = weights[i] @ x[i, kind]
    return out


@_summarize.register_fake
def _(weights, tokens):
    return tokens.new_empty(tokens.shape[0], tokens.shape[2], weights.shape[1], weights.shape[2], tokens.shape[4])


@torch.library.custom_op('ls_vision::summarize_backward', mutates_args=())
def _summarize_backward(grad: Tensor, weights: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of the weights and of the tokens."""
    (B, h, r, N), (n, d) = weights.shape, (tokens.shape[2], tokens.shape[4])
    x = tokens.permute(0, 2, 3, 4, 1)  # (B, n, h, d, N)
    grad = grad.contiguous()  # (B, n, h, r, d)
    if x.device.type != 'cpu':
        grad_tokens = torch.matmul(weights.unsqueeze(1).transpose(3, 4), grad)  # (B, n, h, N, d)
        return torch.matmul(grad, x).sum(1), grad_tokens.permute(0, 3, 1, 2, 4).contiguous()
    grad_weights, grad_tokens = weights.new_empty(weights.shape), tokens.new_empty(tokens.shape)
    for i in image_chunks(B, tokens[0].numel()):
        out = grad_weights[i].flatten(0, 1)  # (images * h, r, N), as below
        for kind in range(n):
            torch.baddbmm(out, grad[i, kind].flatten(0, 1), x[i, kind].flatten(0, 1), beta=float(kind > 0), out=out)
        # (images, h, r, n * d), both kinds by one product
        both = grad[i].permute(0, 2, 3, 1, 4).reshape(-1, h, r, n * d)
        product = weights[i].transpose(2, 3) @ both  # (images, h, N, n * d)
        grad_tokens[i].copy_(product.view(-1, h, N, n, d).permute(0, 2, 3, 1, 4))
    return grad_weights, grad_tokens


@_summarize_backward.register_fake
def _(grad, weights, tokens):
    return weights.new_empty(weights.shape), tokens.new_empty(tokens.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> Tuple[Tensor, Tensor]:
    return torch.ops.ls_vision.summarize_backward(grad, *ctx.saved_tensors)


_summarize.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.ls_vision.summarize)
def _forward_flops(weights, tokens, *args, **kwargs) -> int:
    B, h, r, N = weights
    return 2 * B * h * r * N * tokens[2] * tokens[4]


@register_flop_formula(torch.ops.ls_vision.summarize_backward)
def _backward_flops(grad, weights, tokens, *args, **kwargs) -> int:
    return 2 * _forward_flops(weights, tokens)
