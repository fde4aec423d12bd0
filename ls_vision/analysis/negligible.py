"""Operators of negligible cost, by their names in a trace, in-place ones without their last underscore.

An operator that is neither listed here nor counted is an error.
"""
_ELEMENTWISE = '''
abs add addcmul ceil clamp_max clamp_min cos div elu erf exp expm1 gelu hardsigmoid hardswish hardtanh leaky_relu
log log1p logical_and logical_not logical_or lt le maximum minimum mish mul ne neg pow prelu reciprocal relu6 round
rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tanh where
'''
_REDUCTIONS = '''
all amax amin any argmax argmin avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d cumsum
linalg_vector_norm log_softmax logsumexp max_pool1d max_pool2d mean min norm prod softmax std std_mean sum topk
var var_mean
'''
_MOVES = '''
alias argsort bitwise_and broadcast_tensors clone col2im diff empty_like expand_as eye feature_dropout fill flip im2col
index_add index_select linspace masked_select meshgrid movedim new_ones numpy_T ones_like pad pixel_shuffle
pixel_unshuffle repeat repeat_interleave replication_pad2d reflection_pad2d reshape_as scatter scatter_add
sort swapaxes take_along_dim tensor_split tile tril triu unflatten unfold upsample_bicubic2d view_as zero
'''
NEGLIGIBLE = frozenset(f'aten::{name}' for name in f'{_ELEMENTWISE} {_REDUCTIONS} {_MOVES}'.split())
