"""An interpreter of the PTX that Triton compiles for GPUs of compute capability 8.0, and tests of our kernels on it.

It finds what results on one GPU may hide: races, reads of what was never written, accesses outside tensors.
"""
