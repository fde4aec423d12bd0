"""Are the kernels right on this machine? Tried once for each kind of problem before they become the default for it.

A compiler, a driver or a GPU that nobody has tried may refuse a kernel, or run it and be wrong. A small problem with
ragged edges is computed by the kernels and by `blocked`, forward and backward. Where they differ, or the kernels raise,
one warning says why, and `blocked` computes problems of that kind from then on.

An illegal memory access ends the process's use of the GPU, whoever catches the exception. `ls-vision doctor` tries the
kernels in a process of their own.
"""
import os
import threading
import warnings
from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor

from ...window import Window
from .. import probe
from ..blocked import blocked_backward, blocked_forward
from . import launch

# Set to 0 to trust the kernels untried.
TRIAL_ENV = 'LS_VISION_TRITON_TRIAL'


class Kind(NamedTuple):
    """What the kernels are compiled for."""
    device: torch.device
    dtype: torch.dtype
    problem: probe.Problem


_outcomes: Dict[Kind, Optional[str]] = {}
_lock = threading.RLock()


def failure(query: Tensor, window: Window, additional: Optional[Tensor], bias: Optional[Tensor]) -> Optional[str]:
    """Why the kernels can't be trusted with such a problem, None where they passed or can't be tried now."""
    num_additional = None if additional is None else additional.shape[1]
    problem = probe.Problem(query.shape[-1], window, num_additional, bias is not None)
    return _outcome(Kind(query.device, query.dtype, problem))


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
                    f"{kind.problem}: {reason}. The backend 'blocked' computes it instead, more slowly. Please report "
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
    query, pair, additional, bias, grad = probe.draw(kind.problem, kind.dtype, kind.device)
    arguments = query, pair, kind.problem.window, additional, bias, kind.problem.head_dim ** -0.5
    needs = [True] * 4
    out, lse = blocked_forward(*arguments, True)
    expected = (out, lse, *blocked_backward(grad, None, *arguments, out, lse, needs))
    with launch.poisoned():
        out, statistics = launch.forward(*arguments, True)
        actual = (
            out, statistics.sum(0), *launch.backward(grad, None, *arguments, out, statistics, needs))
    error, name = probe.largest_error(('output', 'log-sum-exp', *probe.GRADIENTS), actual, expected)
    if error > probe.tolerance(kind.dtype, kind.device):
        return f'their {name} differs from that of `blocked` by {error:.2g} of its largest entry'
    return None
