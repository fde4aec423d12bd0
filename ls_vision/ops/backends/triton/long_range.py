"""Launches the fused kernels of the long-range half.

Shapes: B batch, N tokens, n kinds of tokens (keys and values), h heads, d head width, r rank; g global queries, m own
keys of the global tokens. Sums are (B, R, n, h, d) and their statistics (2, B, R, h) float32: the largest logit and the
logarithm of the sum of exponentials relative to it, for the r or g rows R.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ...joint_heads import float16_scale
from ...numerics import allows_tf32
from . import launch as launcher
from .launch import Arguments, ceil_div, power_of_two, readable, sum_parts

# Sums of more rows would spill registers.
_MOST_ROWS, _MOST_ROWS_FLOAT32 = 32, 16
# An image is cut into chunks until this many programs run, which fill a large GPU a few times, or a chunk has as few
# tokens as here.
_PROGRAMS = 512
_SMALLEST_CHUNK = 256


def why_not(tokens: Tensor, num_rows: int) -> Optional[str]:
    """The reason why the kernels can't compute sums of (B, N, n, h, d) tokens here, None where they can."""
    most = _MOST_ROWS_FLOAT32 if tokens.dtype == torch.float32 else _MOST_ROWS
    if num_rows > most:
        return f'the kernels take up to {most} summaries or global tokens in {tokens.dtype}, not {num_rows}'
    return launcher.no_platform(tokens.device, tokens.dtype) or launcher.no_head(tokens.shape[-1])


def summarize(scores: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Sums of the tokens weighted by the softmax of the scores, (B, h, r, N), and statistics."""
    B, _, kinds, h, d = tokens.shape
    r = scores.shape[2]
    arguments = {**_shared(tokens, r), **_tokens_and_scores(scores, tokens)}
    return _launch_sums('summaries', arguments, tokens, (B, r, kinds, h, d))


def summarize_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        scores: Tensor,
        tokens: Tensor,
        sums: Tensor,
        statistics: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Gradients of scores and tokens, from those of the sums and of the log-sum-exp, (B, r, h) or None."""
    B, N, kinds, h, d = tokens.shape
    r = scores.shape[2]
    grad_scores = launcher.buffer((B, N, h, r), scores.dtype, scores.device).permute(0, 2, 3, 1)
    grad_tokens = launcher.buffer((B, N, kinds, h, d), tokens.dtype, tokens.device)
    arguments = {
        **_shared(tokens, r), **_tokens_and_scores(scores, tokens), **_sums_gradient(grad, grad_lse, sums, statistics),
        'dscores_ptr': grad_scores, 'dx_ptr': grad_tokens}
    launcher.launch('summaries_gradient', B * h * arguments['splits'], arguments, tokens)
    return grad_scores, grad_tokens


def attend(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Tuple[Tensor, Tensor]:
    """Attention of (B, g, h, d) queries to (B, m, 2, h, d) own keys and values and to the tokens, keys first and values
    last, and statistics."""
    B, g, h, d = query.shape
    arguments = {**_shared(tokens, g), **_queries_and_keys(query, own, tokens, scale), 'KINDS': 1}
    sums, statistics = _launch_sums('global_attention', arguments, query, (B, g, 1, h, d))
    return sums.squeeze(2), statistics


def attend_backward(
        grad: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        own: Tensor,
        tokens: Tensor,
        scale: float,
        out: Tensor,
        statistics: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, own keys and values, and tokens, from those of the output and of the log-sum-exp, (B, g, h)
    or None."""
    B, g, h, d = query.shape
    arguments = {
        **_shared(tokens, g), **_queries_and_keys(query, own, tokens, scale),
        **_sums_gradient(grad, grad_lse, out, statistics)}
    splits = arguments['splits']
    grad_own, grad_tokens = (launcher.buffer(x.shape, x.dtype, x.device) for x in (own, tokens))
    grad_query = launcher.buffer((splits, B, g, h, d), query.dtype if splits == 1 else torch.float32, query.device)
    arguments.update(dq_ptr=grad_query, down_ptr=grad_own, dx_ptr=grad_tokens)
    launcher.launch('global_gradient', B * h * splits, arguments, query)
    return sum_parts(grad_query, query.dtype), grad_own, grad_tokens


def _launch_sums(
        name: str,
        arguments: Arguments,
        operand: Tensor,
        shape: Tuple[int, int, int, int, int],
) -> Tuple[Tensor, Tensor]:
    """Sums and statistics by a kernel, in one step or, with several chunks per image, in two."""
    (B, R, _, h, _), splits = shape, arguments['splits']
    out = launcher.buffer(shape, operand.dtype, operand.device)
    statistics = launcher.buffer((2, B, R, h), torch.float32, operand.device)
    results = dict(out_ptr=out, peak_ptr=statistics[0], log_total_ptr=statistics[1])
    if splits == 1:
        launcher.launch(name, B * h, {**arguments, **results}, operand)
        return out, statistics
    parts = launcher.buffer((splits, *shape), torch.float32, operand.device)
    totals = launcher.buffer((2, splits, B, R, h), torch.float32, operand.device)
    part = dict(out_ptr=parts, peak_ptr=totals[0], log_total_ptr=totals[1])
    launcher.launch(name, B * h * splits, {**arguments, **part}, operand)
    whole = dict(results, parts_ptr=parts, part_peaks_ptr=totals[0], part_totals_ptr=totals[1], rows=B * R * h)
    launcher.launch('merge', B * R * h, {**arguments, **whole}, operand)
    return out, statistics


def constants(head_dim: int, num_rows: int, kinds: int, dtype: torch.dtype, single: bool) -> Arguments:
    """Compile-time arguments of the kernels, but for block shapes and some that are not of all kernels."""
    return dict(
        HEAD_DIM=head_dim, D=max(power_of_two(head_dim), 16), R=num_rows, ROWS=max(power_of_two(num_rows), 16),
        KINDS=kinds, SINGLE=single, FACTOR=float16_scale() if dtype == torch.float16 else 1.,
        PRECISION='tf32' if dtype == torch.float32 and allows_tf32() else 'ieee')


def _shared(tokens: Tensor, num_rows: int) -> Arguments:
    """What the kernels have in common, by the names of their parameters."""
    B, N, kinds, h, d = tokens.shape
    splits = max(min(ceil_div(_PROGRAMS, max(B * h, 1)), N // _SMALLEST_CHUNK), 1)
    # offsets within a chunk are 32 bit
    splits = max(splits, ceil_div(N * max(tokens.stride(1), kinds * h * max(d, num_rows)), 2 ** 31 - 1))
    chunk = max(ceil_div(N, splits), 1)
    return dict(
        B=B, h=h, N=N, splits=max(ceil_div(N, chunk), 1), chunk=chunk,
        **constants(d, num_rows, kinds, tokens.dtype, chunk >= N))


def _tokens_and_scores(scores: Tensor, tokens: Tensor) -> Arguments:
    tokens = readable(tokens, tokens.dtype)
    arguments: Arguments = dict(scores_ptr=scores, x_ptr=tokens)
    arguments.update({f's_{axis}': stride for axis, stride in zip('bhrn', scores.stride())})
    b, n, kind, head, _ = tokens.stride()
    return dict(arguments, x_b=b, x_n=n, x_kind=kind, x_h=head)


def _queries_and_keys(query: Tensor, own: Tensor, tokens: Tensor, scale: float) -> Arguments:
    query, own, tokens = (readable(x, query.dtype) for x in (query, own, tokens))
    q_b, q_r, q_h, _ = query.stride()
    own_b, own_m, _, own_h, _ = own.stride()
    k_b, k_n, _, k_h, _ = tokens.stride()
    return dict(
        q_ptr=query, own_k_ptr=own[:, :, 0], own_v_ptr=own[:, :, 1], k_ptr=tokens[:, :, 0], v_ptr=tokens[:, :, -1],
        q_b=q_b, q_r=q_r, q_h=q_h, own_b=own_b, own_m=own_m, own_h=own_h, k_b=k_b, k_n=k_n, k_h=k_h,
        M=own.shape[1], scale=scale)


def _sums_gradient(grad: Tensor, grad_lse: Optional[Tensor], sums: Tensor, statistics: Tensor) -> Arguments:
    """What backward kernels read of sums and their gradients; sums and gradients must be contiguous."""
    statistics = statistics.contiguous()
    return dict(
        out_ptr=sums.contiguous(), dout_ptr=grad.contiguous(), peak_ptr=statistics[0], log_total_ptr=statistics[1],
        HAS_LSE=grad_lse is not None,
        dlse_ptr=statistics if grad_lse is None else grad_lse.float().contiguous())
