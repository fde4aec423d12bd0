"""Multiply-adds of a model, counted in three ways that must agree.

The result is fvcore's count, as in papers: one per multiply and add, of convolutions, linear maps and attention
products. It is checked against PyTorch's `FlopCounterMode` and against closed formulas of the layers. All three run on
the meta device, where nothing is computed or allocated, so that 4096 px cost no more than 224 px.
"""
import contextlib
import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ls_vision.analysis.formulas import PARTS, count_by_formula, find_formula
from ls_vision.analysis.negligible import NEGLIGIBLE
from ls_vision.analysis.zoo import ImageSize, build, size_name
from ls_vision.layers import LongShortAttention2d
from ls_vision.ops.window import make_window, num_keys
from ls_vision.runtime.errors import UserError, first_line

TOLERANCE = 0.01


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image."""
    model: str
    img_size: ImageSize
    params: int
    macs: int
    """By fvcore."""
    counters: dict[str, Optional[int]]
    """By 'fvcore', 'torch' and 'formula'; None of the latter where a layer has no formula."""
    parts: dict[str, int]
    """By kind of operation, keys `PARTS`."""
    stages: dict[str, int]
    """By stage, and by module outside of stages."""
    without_formula: tuple[str, ...]
    """Classes of the layers that have no formula."""


def count(name: str, size: ImageSize) -> Count:
    """Counts a registered model, of this package or of timm, at an image size.

    Raises:
        UserError: There is no such model, it does not take such images, it has an operator that cannot be
            counted, or the counters disagree by more than 1 %.
    """
    with _on_meta(name, size) as (model, images):
        by_module = _count_by_module(model, images)
        formula = sum(count_by_formula(model, images).values())
        fvcore = _count_by_fvcore(model, images)
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {path: ops for path, ops in by_module.items() if sum(ops.values())}
    missing = tuple(sorted({type(modules[path]).__name__ for path in own if find_formula(modules[path]) is None}))
    torch_macs = sum(sum(ops.values()) for ops in own.values())
    result = Count(
        name, size, sum(p.numel() for p in model.parameters()), fvcore,
        dict(fvcore=fvcore, torch=torch_macs, formula=None if missing else formula),
        _split_by_part(own, modules), _split_by_stage(own), missing)
    _check_agreement(result)
    return result


@functools.cache
def count_quickly(name: str, size: ImageSize) -> int:
    """Multiply-adds of one image by PyTorch's counter alone, in a fraction of the time of `count`.

    Raises:
        UserError: There is no such model, or it does not take such images.
    """
    with _on_meta(name, size) as (model, images):
        return sum(sum(ops.values()) for ops in _count_by_module(model, images).values())


@contextlib.contextmanager
def _on_meta(name: str, size: ImageSize) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """A model in evaluation and one image without memory; errors of a block that counts become a `UserError`."""
    model = build(name, size, device='meta').eval().requires_grad_(False)
    images = torch.empty(1, getattr(model, 'in_chans', 3), *size, device='meta')
    try:
        with torch.no_grad():
            yield model, images
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{name} cannot be counted at {size_name(size)}: {first_line(e)}') from e


def _check_agreement(result: Count) -> None:
    known = [macs for macs in result.counters.values() if macs is not None]
    if max(known) - min(known) > TOLERANCE * max(known):
        counted = ', '.join(f'{counter} {macs:,}' for counter, macs in result.counters.items() if macs is not None)
        raise UserError(
            f'{result.model} at {size_name(result.img_size)}: the counters disagree by more than {TOLERANCE:.0%}: '
            f'{counted}')


# ---- PyTorch's counter -----------------------------------------------------------------------------------------------

def _count_by_module(model: nn.Module, images: torch.Tensor) -> dict[str, dict[str, int]]:
    """Multiply-adds of each module without those of its children, by operator."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    root = type(model).__name__
    inclusive = {
        path[len(root) + 1:]: Counter({str(op): flops // 2 for op, flops in ops.items()})
        for path, ops in counter.get_flop_counts().items() if path.split('.')[0] == root}
    own = {path: Counter(ops) for path, ops in inclusive.items()}
    for path, ops in inclusive.items():
        parent = path
        while parent:
            parent = parent.rpartition('.')[0]
            if parent in own:
                own[parent].subtract(ops)
                break
    return {path: dict(ops) for path, ops in own.items()}


def _split_by_part(own: dict[str, dict[str, int]], modules: dict[str, nn.Module]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for path, ops in own.items():
        for op, macs in ops.items():
            for part, share in _shares(op, modules[path]).items():
                parts[part] += round(macs * share)
    return parts


def _shares(op: str, module: nn.Module) -> dict[str, float]:
    """The parts among which the multiply-adds of an operator that a module calls are divided."""
    if 'conv' in op:
        return {'convolution': 1.}
    if op in ('aten.mm', 'aten.addmm'):
        return {'linear': 1.}
    if isinstance(module, LongShortAttention2d):
        if op != 'ls_vision.long_short_attention':
            return {'long-range': 1.}  # summaries and the attention of global tokens
        in_window = num_keys(make_window(module.window_size))
        share = in_window / (in_window + module.rank + module.num_global_tokens)
        return {'window': share, 'long-range': 1. - share}
    return {'window' if 'Window' in type(module).__name__ else 'full attention': 1.}


def _split_by_stage(own: dict[str, dict[str, int]]) -> dict[str, int]:
    stages: Counter[str] = Counter()
    for path, ops in own.items():
        numbered = re.match(r'\w+\.\d+', path)
        stages[numbered[0] if numbered else path.split('.')[0] or 'model'] += sum(ops.values())
    return dict(sorted(stages.items(), key=lambda item: [int(t) if t.isdigit() else t for t in
                                                         re.split(r'(\d+)', item[0])]))


# ---- fvcore ----------------------------------------------------------------------------------------------------------

def _count_by_fvcore(model: nn.Module, images: torch.Tensor) -> int:
    """fvcore's count, with handles for operators that it does not know.

    Raises:
        UserError: An operator has no handle and is not among the negligible ones.
    """
    analysis = FlopCountAnalysis(model, images).set_op_handle(**HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    with warnings.catch_warnings(), _tracing_on_meta():
        warnings.simplefilter('ignore')
        macs = int(analysis.total())
    unknown = sorted(op for op in analysis.unsupported_ops() if op.removesuffix('_') not in NEGLIGIBLE)
    if unknown:
        raise UserError(
            f'{type(model).__name__} has operators that cannot be counted: {", ".join(unknown)}; expected products, '
            f'convolutions, attention, and operators of negligible cost')
    return macs


def _count_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """A product, also of broadcast operands, which fvcore's own handle misses."""
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def _count_baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return _count_matmul(inputs[1:], outputs)


def _count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """scaled_dot_product_attention: logits, then the weighted sum of values."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


HANDLES: dict[str, Any] = {
    'aten::matmul': _count_matmul,
    'aten::baddbmm': _count_baddbmm,
    'aten::scaled_dot_product_attention': _count_attention,
    # fvcore counts these by elements; papers count products
    **dict.fromkeys((
        'aten::adaptive_avg_pool2d', 'aten::batch_norm', 'aten::grid_sampler', 'aten::group_norm',
        'aten::instance_norm', 'aten::layer_norm', 'aten::upsample_bilinear2d', 'aten::upsample_nearest2d',
    ), lambda inputs, outputs: 0),
}


@contextlib.contextmanager
def _tracing_on_meta() -> Iterator[None]:
    """Lets `torch.jit` trace tensors on the meta device, which it does not support."""
    thread = ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,))
    with thread, _RecordedConvolutions(), _UntracedKernels(thread):
        yield


class _UntracedKernels(TorchDispatchMode):
    """Runs kernels in another thread.

    Tracing is a state of the thread that turns sizes into tensors, but the Python code that infers shapes on the meta
    device needs numbers.
    """

    def __init__(self, executor: ThreadPoolExecutor):
        super().__init__()
        self.executor = executor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.executor.submit(self._run, func, args, kwargs or {}).result()

    @staticmethod
    def _run(func, args, kwargs):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if func is torch.ops.aten._convolution.default:
                func, args = torch.ops.aten.convolution.default, args[:9]
            return func(*args, **kwargs)


class _RecordedConvolutions(TorchFunctionMode):
    """Calls the operator that a trace records for a convolution; otherwise only CPU and GPU kernels call it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            return _convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    """`torch.conv1d`, `conv2d` or `conv3d`."""
    dims = weight.dim() - 2
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == 'same':
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:])]
    padding = [0] * dims if padding == 'valid' else _each(padding, dims)
    return torch._convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * dims, groups, False, False, False, False)


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
