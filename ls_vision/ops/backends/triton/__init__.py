"""Long-short attention by fused Triton kernels, for GPUs since Ampere."""
from .launch import backward, forward, why_not

__all__ = ['backward', 'forward', 'why_not']
