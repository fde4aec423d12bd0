"""Long-short attention by fused Triton kernels, for GPUs since Ampere."""
from .launch import backward, forward, why_not
from .trial import failure

__all__ = ['backward', 'failure', 'forward', 'why_not']
