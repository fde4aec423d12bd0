#!/usr/bin/env python3
"""Kernels that a GPU would launch, and bytes that it would copy, counted without one.

    python benchmarks/gpu_launches.py
    python benchmarks/gpu_launches.py vil_ls_medium_linear swin_small_patch4_window7_224 --batch-size 64

A model in bfloat16 computes on tensors without memory (`device='meta'`). Every ATen operation but views and allocations
counts as one kernel, a few as more. This package's operators are opened: what they do on a GPU runs on the same
tensors, and a launch of a Triton kernel counts as one. Bytes are those that copies inside of these operators read and
write. An optimiser's kernels are not counted.
"""
import argparse
import contextlib
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ls_vision  # noqa: F401  registers the models
from ls_vision.analysis import zoo
from ls_vision.analysis.tables import markdown
from ls_vision.ops import attention, backends, calls, fused_long_range, long_range
from ls_vision.ops.backends.triton import launch
from ls_vision.runtime.errors import UserError

MODELS = ('vil_ls_medium', 'vil_ls_medium_linear', 'cvt_ls_21', 'swin_small_patch4_window7_224')
# Of operations that are not one kernel each, as PyTorch 2.9 launches them.
KERNELS = {
    'native_layer_norm_backward': 2, 'convolution_backward': 3, 'native_batch_norm': 2, 'native_batch_norm_backward': 2,
    '_scaled_dot_product_efficient_attention_backward': 2, '_scaled_dot_product_flash_attention_backward': 3,
}
NO_KERNEL = {
    'empty', 'empty_like', 'new_empty', 'empty_strided', 'new_empty_strided', 'detach', 'lift_fresh', 'alias',
    '_unsafe_view', '_reshape_alias', 'is_same_size'}
COPIES = {'clone', '_to_copy', 'copy_'}
OPERATORS = {
    'long_short_attention': attention._attention, 'long_short_attention_backward': attention._attention_backward,
    'summarize': long_range._summarize, 'summarize_backward': long_range._summarize_backward,
    'global_attention': long_range._attend, 'global_attention_backward': long_range._attend_backward,
    'fused_summarize': fused_long_range._summarize, 'fused_summarize_backward': fused_long_range._summarize_backward,
    'fused_global_attention': fused_long_range._attend,
    'fused_global_attention_backward': fused_long_range._attend_backward,
}


class Count(TorchDispatchMode):
    """Counts kernels by operation and by operator, and bytes of copies inside of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.operators: list[str] = []  # that are open

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = function.name().split('::')
        if namespace == 'ls_vision':
            return self._open(name, args, kwargs)
        name = name.split('.')[0]
        if self.operators and name not in COPIES and function._can_decompose():
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        if not function.is_view and name not in NO_KERNEL:
            self.add(name, KERNELS.get(name, 1))
            if self.operators and name in COPIES:
                self.copied[self.operators[-1]] += 2 * out.nbytes
        return out

    def _open(self, name: str, args: Any, kwargs: Any) -> Any:
        """Runs an operator's implementation for a GPU, operation by operation."""
        self.operators.append(name)
        try:
            with self:
                return OPERATORS[name]._init_fn(*args, **kwargs)
        finally:
            self.operators.pop()

    def add(self, name: str, kernels: int = 1) -> None:
        self.kernels[f'{self.operators[-1]}: {name}' if self.operators else name] += kernels

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


class Row(NamedTuple):
    """Counts of a model."""
    model: str
    inference: int
    step: int
    copied_forward: int
    """Bytes in a training step's forward pass."""
    copied_backward: int
    kernels: Counter[str]
    """Of a training step, by operation."""


def count(name: str, batch_size: int, img_size: int) -> Row:
    """Counts inference and a training step without the optimiser."""
    with torch.device('meta'):
        model = timm.create_model(name).bfloat16()
        x = torch.empty(batch_size, 3, img_size, img_size, dtype=torch.bfloat16)
    with as_on_gpu() as counted:
        with torch.no_grad(), counted:
            model.eval()(x)
        inference = counted.total
    with as_on_gpu() as counted, counted:
        loss = model.train()(x).float().logsumexp(-1).mean()
        forward = counted.copied.total()
        loss.backward()
    return Row(name, inference, counted.total, forward, counted.copied.total() - forward, counted.kernels)


@contextlib.contextmanager
def as_on_gpu() -> Any:
    """A block in which meta tensors are computed as those on a GPU of compute capability 9.0."""
    counted = Count()

    def count_launch(name: str, programs: int, arguments: Any, operand: Tensor, **blocked: int) -> None:
        counted.add(f'Triton {name}')

    with contextlib.ExitStack() as stack:
        for where, name, replacement in (
                (calls, '_has_foreign_mode', lambda: False),  # or the operators would step aside for this counter
                (launch, 'launch', count_launch),
                (launch, 'no_platform', lambda device, dtype: None),
                (launch, '_interpreting', lambda: False),
                (backends, '_prefers_triton', lambda query: True),
                (F, 'scaled_dot_product_attention', attend_on_gpu)):
            stack.enter_context(mock.patch.object(where, name, replacement))
        yield counted


def attend_on_gpu(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.,
        is_causal: bool = False,
        scale: Any = None,
) -> Tensor:
    """What PyTorch launches on a GPU: its flash kernel, or with a mask the other one, which wants aligned rows."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    keys = k.shape[2]
    attn_mask = F.pad(attn_mask.to(q.dtype), (0, -keys % 16))[..., :keys]
    attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, metavar='MODEL', help='default: %(default)s')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--kernels', action='store_true', help='list the kernels of a training step, too')
    args = parser.parse_args()
    try:
        for name in args.models:
            zoo.check_model(name)
    except UserError as e:
        parser.error(str(e))
    rows = [count(name, args.batch_size, args.img_size) for name in args.models]
    print(markdown(rows, {
        'model': lambda row: row.model,
        'kernels, inference': lambda row: str(row.inference),
        'kernels, training step': lambda row: str(row.step),
        'MB copied forward': lambda row: f'{row.copied_forward / 1e6:.1f}',
        'MB copied backward': lambda row: f'{row.copied_backward / 1e6:.1f}',
    }))
    for row in rows if args.kernels else ():
        print(f'\n{row.model}: ' + ', '.join(f'{number} {name}' for name, number in row.kernels.most_common()))


if __name__ == '__main__':
    main()
