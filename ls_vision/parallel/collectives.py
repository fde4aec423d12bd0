"""What passes between the strips of an image, as functions that autograd follows.

Gradients are those of the sum over all ranks of what each rank differentiates; `ls_vision.parallel.model` takes the
mean over the ranks for each parameter, as data parallelism does. So a loss that all ranks compute alike counts once.

Shapes: B batch, P ranks, R rows of a strip, W columns.
"""
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.long_range import merge_parts
from ..ops.numerics import at_least_float32
from .link import Link

# log-sum-exps travel in twice the precision of the sums, for they are differences of large numbers that are
# exponentiated: as many bytes as a running maximum and a sum of exponentials
_TWICE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


# ---- sums over all tokens --------------------------------------------------------------------------------------------

@torch.compiler.disable
def merge_strips(out: Tensor, lse: Tensor, link: Link, what: str) -> Tensor:
    """Softmax-weighted sums over the tokens of each strip -> those over all tokens, the same on all ranks.

    Args:
        out: (..., D), sums over this rank's tokens.
        lse: (...), their log-sum-exp.
        link: The ranks.
        what: Name under which the bytes are counted.
    """
    return out if link.size == 1 else _MergeStrips.apply(out, lse, link, what)


class _MergeStrips(torch.autograd.Function):

    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor, link: Link, what: str) -> Tensor:
        wide = _TWICE.get(out.dtype, out.dtype)
        lse_wide = lse.to(wide)
        message = torch.cat([t.contiguous().flatten().view(torch.uint8) for t in (lse_wide, out)])
        messages = link.gather(message, what)  # (P, bytes)
        lse_bytes = lse_wide.nbytes
        parts = [
            (m[lse_bytes:].clone().view(out.dtype).view(out.shape).to(wide),
             m[:lse_bytes].clone().view(wide).view(lse.shape)) for m in messages]
        total, total_lse = merge_parts(parts)
        weight = (lse_wide - total_lse).exp().unsqueeze(-1)  # this strip's share
        total = total.to(out.dtype)
        ctx.save_for_backward(out, total, weight)
        ctx.link, ctx.what, ctx.lse_dtype = link, what, lse.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        out, total, weight = ctx.saved_tensors
        grad = at_least_float32(ctx.link.sum(grad, ctx.what)) * weight
        grad_lse = (grad * (out - total)).sum(-1)
        return grad.to(out.dtype), grad_lse.to(ctx.lse_dtype), None, None


@torch.compiler.disable
def sum_strips(x: Tensor, link: Link, what: str) -> Tensor:
    """The sum over all ranks, the same on all ranks."""
    return x if link.size == 1 else _SumStrips.apply(x, link, what)


class _SumStrips(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, link: Link, what: str) -> Tensor:
        ctx.link, ctx.what = link, what
        return link.sum(x, what)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        return ctx.link.sum(grad, ctx.what), None, None


@torch.compiler.disable
def join_rows(x: Tensor, rows: Sequence[int], link: Link, what: str) -> Tensor:
    """(B, C, R, W) of each rank, R as `rows` says -> (B, C, all rows, W), the same on all ranks."""
    return x if link.size == 1 else _JoinRows.apply(x, rows, link, what)


class _JoinRows(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, rows: Sequence[int], link: Link, what: str) -> Tensor:
        ctx.rows, ctx.link, ctx.what = rows, link, what
        B, C, R, W = x.shape
        padded = torch.cat([x, x.new_zeros(B, C, max(rows) - R, W)], dim=2)
        return torch.cat([part[:, :, :n] for part, n in zip(link.gather(padded, what), rows)], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        return ctx.link.sum(grad, ctx.what).split(ctx.rows, dim=2)[ctx.link.rank], None, None, None


# ---- rows of the neighbours ------------------------------------------------------------------------------------------

class Margin(NamedTuple):
    """Rows that a strip is extended by: those of its neighbours next to it, and zeros beyond them."""
    above: int
    """Rows of the upper neighbour that are needed."""
    below: int
    top: int
    """Rows in all above the strip, `above` or more unless it is the first."""
    bottom: int


class Halo:
    """The rows around a strip, on their way: `start` posts them, `finish` waits for them; backward, the other way."""

    def __init__(self, rows: Sequence[int], margin: Margin, link: Link, what: str):
        """
        Args:
            rows: R of each rank.
            margin: What is needed. A strip lower than that passes all it has.
            link: The ranks.
            what: Name under which the bytes are counted.
        """
        self.link, self.what, self.rows = link, what, rows[link.rank]
        first, last = link.rank == 0, link.rank == link.size - 1
        self.top, self.bottom = margin.top, margin.bottom
        self.from_above = 0 if first else min(margin.above, rows[link.rank - 1])
        self.from_below = 0 if last else min(margin.below, rows[link.rank + 1])
        self.to_above = 0 if first else min(margin.below, self.rows)
        self.to_below = 0 if last else min(margin.above, self.rows)
        self.works: List[Any] = []
        self.received: Tuple[Tensor, ...] = ()
        self.sending: Tuple[Tensor, ...] = ()  # kept until they are sent

    @torch.compiler.disable
    def start(self, x: Tensor) -> Tensor:
        """(B, R, W, ...) -> (B, top + R + bottom, W, ...), whose outer rows are zeros until `finish`."""
        return _StartHalo.apply(x, self)

    @torch.compiler.disable
    def finish(self, x: Tensor) -> Tensor:
        """The result of `start` with the neighbours' rows."""
        return _FinishHalo.apply(x, self)

    def strip(self, x: Tensor) -> Tensor:
        """The strip itself, a view of what was extended."""
        return x[:, self.top:self.top + self.rows]

    def post(self, to_above: Tensor, to_below: Tensor, from_above: int, from_below: int) -> None:
        above, below = self.sending = to_above.contiguous(), to_below.contiguous()
        self.received = tuple(
            x.new_empty(x.shape[0], n, *x.shape[2:]) for x, n in ((above, from_above), (below, from_below)))
        self.works = self.link.post(above, below, self.received[0], self.received[1], self.what)

    def wait(self) -> Tuple[Tensor, ...]:
        """What came from above and from below."""
        self.link.wait(self.works, self.what)
        received = self.received
        self.works, self.sending, self.received = [], (), ()
        return received


class _StartHalo(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        out = x.new_empty(x.shape[0], halo.top + halo.rows + halo.bottom, *x.shape[2:])
        out[:, :halo.top] = 0
        halo.strip(out).copy_(x)
        out[:, halo.top + halo.rows:] = 0
        halo.post(x[:, :halo.to_above], x[:, halo.rows - halo.to_below:], halo.from_above, halo.from_below)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        halo = ctx.halo
        above, below = halo.wait()
        out = halo.strip(grad).clone()
        out[:, :halo.to_above] += above
        out[:, halo.rows - halo.to_below:] += below
        return out, None


class _FinishHalo(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        above, below = halo.wait()
        # by `data`: views of the strip's own rows may already be saved for the backward pass, and stay as they are
        x.data[:, halo.top - halo.from_above:halo.top] = above
        x.data[:, halo.top + halo.rows:halo.top + halo.rows + halo.from_below] = below
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        halo = ctx.halo
        stop = halo.top + halo.rows
        halo.post(
            grad[:, halo.top - halo.from_above:halo.top], grad[:, stop:stop + halo.from_below],
            halo.to_above, halo.to_below)
        return grad, None
