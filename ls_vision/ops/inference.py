"""Is this a call whose result alone counts, so that the fastest way to it may be taken?"""
import torch
from torch import Tensor


@torch.jit.unused
def is_eager_inference(x: Tensor) -> bool:
    """Neither gradients are asked for nor a program recorded (compiled, exported, traced, of subclasses of Tensor)."""
    if type(x) is not Tensor or torch.is_grad_enabled():
        return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()
