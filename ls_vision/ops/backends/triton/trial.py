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
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ...window import Window, num_keys, num_queries
from ..blocked import blocked_backward, blocked_forward
from . import launch

# Set to 0 to trust the kernels untried.
TRIAL_ENV = 'LS_VISION_TRITON_TRIAL'

# Largest difference from `blocked` as a fraction of the largest entry.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 2e-2


class Kind(NamedTuple):
    """What the kernels are compiled for."""
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    window: Window
    num_additional: Optional[int]
    has_bias: bool


_outcomes: Dict[Kind, Optional[str]] = {}
_lock = threading.RLock()


def failure(query: Tensor, window: Window, additional: Optional[Tensor], bias: Optional[Tensor]) -> Optional[str]:
    """Why the kernels can't be trusted with such a problem, None where they passed or can't be tried now."""
    kind = Kind(
        query.device, query.dtype, query.shape[-1], window, None if additional is None else additional.shape[1],
        bias is not None)
    return _outcome(kind)


@torch.compiler.assume_constant_result  # a compiler need not follow the trial, and does not run it
def _outcome(kind: Kind) -> Optional[str]:
    with _lock:
        if kind not in _outcomes and _can_try(kind):
            _outcomes[kind] = reason = attempt(kind)
            if reason is not None:
                warnings.warn(
                    f"The Triton kernels of long-short attention are not used for {_describe(kind)}: {reason}. The "
                    "backend 'blocked' computes it instead, more slowly. Please report this with the output of "
                    '`ls-vision doctor`.', stacklevel=2)
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
    query, pair, additional, bias, grad = _draw(kind)
    arguments = query, pair, kind.window, additional, bias, kind.head_dim ** -0.5
    needs = [True] * 4
    out, lse = blocked_forward(*arguments, True)
    expected = (out, lse, *blocked_backward(grad, None, *arguments, out, lse, needs))
    with launch.poisoned():
        out, statistics = launch.forward(*arguments, True)
        actual = (
            out, statistics.sum(0),
            *launch.backward(grad, None, *arguments, out, statistics, needs))
    tolerance = _TF32_TOLERANCE if kind.dtype == torch.float32 and launch.allows_tf32() else _TOLERANCE[kind.dtype]
    names = ('output', 'log-sum-exp', 'gradient of queries', 'gradient of keys and values',
             'gradient of additional keys and values', 'gradient of the bias')
    for name, x, y in zip(names, actual, expected):
        if x is None or y is None or y.numel() == 0:
            continue
        error = float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1e-6))
        if not error <= tolerance:  # NaN neither
            return f'their {name} differs from that of `blocked` by {error:.2g} of its largest entry'
    return None


def _draw(kind: Kind) -> Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Tensor]:
    """Query, pair, additional, bias and gradient of the output. Three windows by two, the last ones cut off."""
    generator = torch.Generator().manual_seed(0)  # of its own: the user's random numbers stay as they are
    B, h, d, window = 2, 2, kind.head_dim, kind.window
    H, W = 2 * window.rows + (window.rows + 1) // 2, window.cols + (window.cols + 1) // 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind.device, kind.dtype)

    additional = None if kind.num_additional is None else randn(B, kind.num_additional, 2, h, d)
    bias = randn(h, num_queries(window), num_keys(window)) if kind.has_bias else None
    return randn(B, H, W, h, d), randn(B, H, W, 2, h, d), additional, bias, randn(B, H, W, h, d)


def _describe(kind: Kind) -> str:
    additional = 'no' if kind.num_additional is None else kind.num_additional
    return (
        f'{kind.dtype} on {kind.device}, head width {kind.head_dim}, window {kind.window.rows}, '
        f'{additional} additional keys, {"with" if kind.has_bias else "without"} bias')
