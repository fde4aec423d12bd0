"""The backends of long-short attention and the choice among them.

To add one: a file with its functions, and an entry in `BACKENDS`. Tests run over the registry.
"""
import os
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from ..window import Window
from . import blocked, composite, flex, reference, triton

BACKEND_ENV = 'LS_VISION_BACKEND'

Gradients = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]


class Backend(NamedTuple):
    """One way to compute long-short attention. `ls_vision.ops.attention.attend` describes arguments and results."""
    name: str
    why_not: Callable[[Tensor, Window, bool, bool], Optional[str]]
    """(query, window, with_grad, with_lse) -> why it can't compute this here, None where it can. Never raises."""
    forward: Callable[..., Tuple[Tensor, Tensor]]
    """(query, pair, window, additional, bias, scale, with_lse, padding) -> (out, lse or statistics)."""
    backward: Optional[Callable[..., Gradients]] = None
    """(grad_out, grad_lse, query, pair, window, additional, bias, scale, out, lse, needs, padding) -> gradients of
    query, pair, additional and bias, None for those that `needs` says nobody needs. None where autograd differentiates
    the forward function."""
    keeps_statistics: bool = False
    """The backward pass needs the softmax's statistics: in place of the log-sum-exp, and whether asked for or not,
    forward returns the two parts of which it is the sum, (2, B, h, H, W)."""


def _always(query: Tensor, window: Window, with_grad: bool, with_lse: bool) -> Optional[str]:
    return None


BACKENDS: Dict[str, Backend] = {backend.name: backend for backend in (
    Backend('reference', _always, reference.reference_attention),
    Backend('composite', _always, composite.composite_attention),
    Backend('blocked', _always, blocked.blocked_forward, blocked.blocked_backward),
    Backend('flex', flex.why_not, flex.flex_forward),
    Backend('triton', triton.why_not, triton.forward, triton.backward, keeps_statistics=True),
)}


def resolve(
        name: Optional[str],
        query: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        with_grad: bool,
        with_lse: bool,
) -> Backend:
    """The backend of that name; by default the one in the environment, else Triton's kernels on a GPU, else `blocked`.

    As the default, Triton's kernels are first tried on a small problem of the same kind.

    Raises:
        ValueError: The named backend does not exist, or can't run here; says why.
    """
    for source, asked in (('backend', name), (BACKEND_ENV, os.environ.get(BACKEND_ENV))):
        if asked:
            if asked not in BACKENDS:
                raise ValueError(f'{source} is {asked!r}, expected one of {", ".join(BACKENDS)}.')
            reason = BACKENDS[asked].why_not(query, window, with_grad, with_lse)
            if reason is not None:
                raise ValueError(f"{source} is {asked!r}, which can't run here: {reason}. Use 'blocked'.")
            return BACKENDS[asked]
    takes_triton = (
        _prefers_triton(query) and triton.why_not(query, window, with_grad, with_lse) is None
        and triton.failure(query, window, additional, bias) is None)
    return BACKENDS['triton' if takes_triton else 'blocked']


def takes_kernels(tokens: Tensor, rows: int, others: Sequence[Tensor], is_global: bool) -> bool:
    """Whether Triton's kernels compute sums over all tokens: on a GPU, or where the environment names them.

    Args:
        tokens: (B, N, n, h, d), what is summed.
        rows: Sums per head.
        others: What else a kernel reads.
        is_global: Attention of global tokens, not summaries.
    """
    named = os.environ.get(BACKEND_ENV)
    if named not in (None, '', 'triton') or not (named or _prefers_triton(tokens)):
        return False
    if any(x.dtype != tokens.dtype for x in others) or triton.long_range.why_not(tokens, rows) is not None:
        return False
    return bool(named) or triton.failure_of_sums(tokens, rows, is_global) is None  # what is named is not tried


def _prefers_triton(query: Tensor) -> bool:
    return query.is_cuda
