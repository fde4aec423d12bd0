"""Long-short attention by fused Triton kernels, for GPUs since Ampere."""
from . import long_range
from .launch import backward, forward, why_not
from .trial import failure, failure_of_sums

__all__ = ['backward', 'failure', 'failure_of_sums', 'forward', 'long_range', 'why_not']
