"""Gradients of an opaque operator that can be differentiated again."""
from typing import Callable, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor


def gradients(
        function: Callable[..., Union[Tensor, Tuple[Tensor, ...]]],
        inputs: Sequence[Optional[Tensor]],
        grads: Sequence[Optional[Tensor]],
) -> List[Optional[Tensor]]:
    """Gradients of `inputs` with a graph of their own, as `create_graph=True` asks for.

    An operator's backward formula is opaque like the operator. Here the same function, written as plain operations, is
    computed on the same inputs and differentiated by autograd.

    Args:
        function: Plain operations, of all inputs; one tensor or a tuple of them.
        inputs: Tensors with their own graphs, or None.
        grads: Gradient of each output; None for those that nobody used.

    Returns:
        A gradient for each input, None where it is not wanted.
    """
    with torch.enable_grad():
        # aliases: an input that was computed from another one must not pass its gradient on to that
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        outputs = function(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    used = [(out, grad) for out, grad in zip(outputs, grads) if grad is not None]
    found = iter(torch.autograd.grad(
        [out for out, _ in used], wanted, [grad for _, grad in used], create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
