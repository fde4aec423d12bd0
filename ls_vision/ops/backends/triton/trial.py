"""Are the kernels right on this machine? Tried once for each kind of problem before they become the default for it.

A compiler, a driver or a GPU that nobody has tried may refuse a kernel, or run it and be wrong. A small problem with
ragged edges is computed by the kernels and by portable operations, forward and backward. Where they differ, or the
kernels raise, one warning says why, and portable operations compute problems of that kind from then on.

An illegal memory access ends the process's use of the GPU, whoever catches the exception. `ls-vision doctor` tries the
kernels in a process of their own.
"""
import os
import threading
import warnings
from typing import Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ... import joint_heads
from ...window import Window
from .. import probe
from ..blocked import blocked_backward, blocked_forward
from . import launch, long_range

# Set to 0 to trust the kernels untried.
TRIAL_ENV = 'LS_VISION_TRITON_TRIAL'


class Kind(NamedTuple):
    """What the kernels are compiled for."""
    device: torch.device
    dtype: torch.dtype
    problem: Union[probe.Problem, probe.Sums]


_outcomes: Dict[Kind, Optional[str]] = {}
_lock = threading.RLock()


def failure(query: Tensor, window: Window, additional: Optional[Tensor], bias: Optional[Tensor]) -> Optional[str]:
    """Why the kernels can't be trusted with such a problem, None where they passed or can't be tried now."""
    num_additional = None if additional is None else additional.shape[1]
    problem = probe.Problem(query.shape[-1], window, num_additional, bias is not None)
    return _outcome(Kind(query.device, query.dtype, problem))


def failure_of_sums(tokens: Tensor, rows: int, is_global: bool) -> Optional[str]:
    """The same for sums of (B, N, kinds, h, d) tokens, `rows` of them per head."""
    return _outcome(Kind(
        tokens.device, tokens.dtype, probe.Sums(tokens.shape[-1], rows, tokens.shape[2], is_global)))


@torch.compiler.assume_constant_result  # a compiler need not follow the trial, and does not run it
def _outcome(kind: Kind) -> Optional[str]:
    if kind in _outcomes:  # every call but the first: no thread waits for another
        return _outcomes[kind]
    with _lock:
        if kind not in _outcomes and _can_try(kind):
            _outcomes[kind] = reason = attempt(kind)
            if reason is not None:
                warnings.warn(
                    f'The Triton kernels of long-short attention are not used for {kind.dtype} on {kind.device}, '
                    f'{kind.problem}: {reason}. Portable operations compute it instead, more slowly. Please report '
                    'this with the output of `ls-vision doctor`.', stacklevel=2)
        return _outcomes.get(kind)


def _can_try(kind: Kind) -> bool:
    """Not where kernels are captured, or somebody watches the operations, who would see the trial's."""
    if os.environ.get(TRIAL_ENV, '1') == '0' or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0:
        return False
    return kind.device.type != 'cuda' or not torch.cuda.is_current_stream_capturing()


def attempt(kind: Kind) -> Optional[str]:
    """Runs the kernels on a small problem: what went wrong, None if nothing did. Never raises."""
    try:
        with torch.no_grad(), torch.autocast(kind.device.type, enabled=False):
            return _compare(kind)
    except Exception as e:  # whatever a compiler, a driver or an incomplete installation raises
        message = str(e).strip().split('\n')[0]
        return f'they raise {type(e).__name__}: {message}'


def _compare(kind: Kind) -> Optional[str]:
    if isinstance(kind.problem, probe.Sums):
        names, actual, expected = _sums(kind.problem, kind)
    else:
        names, actual, expected = _attention(kind.problem, kind)
    error, name = probe.largest_error(names, actual, expected)
    if error > probe.tolerance(kind.dtype, kind.device):
        return f'their {name} differs from that of portable operations by {error:.2g} of its largest entry'
    return None


Comparison = Tuple[Sequence[str], Sequence[Optional[Tensor]], Sequence[Optional[Tensor]]]
"""Names of results, results of the kernels, and those that they should have."""


def _attention(problem: probe.Problem, kind: Kind) -> Comparison:
    query, pair, additional, bias, grad = probe.draw(problem, kind.dtype, kind.device)
    arguments = query, pair, problem.window, additional, bias, problem.head_dim ** -0.5
    needs = [True] * 4
    out, lse = blocked_forward(*arguments, True)
    expected = (out, lse, *blocked_backward(grad, None, *arguments, out, lse, needs))
    with launch.poisoned():
        out, statistics = launch.forward(*arguments, True)
        actual = out, statistics.sum(0), *launch.backward(grad, None, *arguments, out, statistics, needs)
    return ('output', 'log-sum-exp', *probe.GRADIENTS), actual, expected


def _sums(problem: probe.Sums, kind: Kind) -> Comparison:
    tokens, scores, query, own, grad = probe.draw_sums(problem, kind.dtype, kind.device)
    scale = problem.head_dim ** -0.5
    if problem.is_global:
        grad = grad.squeeze(2)
        expected = (
            *joint_heads.attend(query, own, tokens, scale, True),
            *joint_heads.attend_backward(grad, None, query, own, tokens, scale))
        with launch.poisoned():
            out, statistics = long_range.attend(query, own, tokens, scale)
            actual = (
                out, statistics.sum(0).transpose(1, 2),
                *long_range.attend_backward(grad, None, query, own, tokens, scale, out, statistics))
        names = 'output', 'log-sum-exp', 'gradient of queries', 'gradient of own keys', 'gradient of tokens'
        return names, actual, expected
    weights = scores.float().softmax(-1)
    sums = joint_heads.summarize(weights.to(kind.dtype), tokens).permute(0, 3, 1, 2, 4)  # from (B, n, h, r, d)
    d_weights, d_tokens = joint_heads.summarize_backward(
        grad.permute(0, 2, 3, 1, 4), weights.to(kind.dtype), tokens)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    with launch.poisoned():
        actual_sums, statistics = long_range.summarize(scores, tokens)
        gradients = long_range.summarize_backward(grad, None, scores, tokens, actual_sums, statistics)
    return (
        ('sums', 'log-sum-exp', 'gradient of scores', 'gradient of tokens'),
        (actual_sums, statistics.sum(0).transpose(1, 2), *gradients),
        (sums, scores.float().logsumexp(-1), d_scores, d_tokens))
