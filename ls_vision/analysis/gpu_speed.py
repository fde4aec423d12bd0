"""How fast and how lean models and layers are on this GPU: the tables of `ls-vision doctor --bench`.

As a program, `python -m ls_vision.analysis.gpu_speed FOLDER`, it writes a dated file. Calls alternate in one process.

* Models in bfloat16, inference and training steps with AdamW's update left out, eager and compiled, each with the
  largest batch that fits: this package's with its default backend and with copied tiles ('composite'), beside timm's.
* The rate at which attention computes, beside the flash kernel of full attention.
* Peak memory of one layer on 65,536 tokens.
"""
import argparse
import contextlib
import datetime
import functools
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ls_vision.analysis.measure import added_memory, alternate, describe_machine, write
from ls_vision.analysis.tables import markdown
from ls_vision.layers import LongShortAttention2d
from ls_vision.ops.attention import long_short_attention
from ls_vision.ops.backends import BACKEND_ENV
from ls_vision.runtime.errors import first_line

SIZES = (224, 512, 1024)
LARGEST_BATCH = 256
SWIN = 'swin_small_patch4_window7_224'


class Contender(NamedTuple):
    """A model and what computes its attention."""
    model: str
    backend: Optional[str] = None
    """None for the default."""

    def __str__(self) -> str:
        return self.model + (f', {self.backend}' if self.backend else '')


CONTENDERS = (
    Contender(SWIN), Contender('convnext_small'), Contender('vil_ls_medium'), Contender('vil_ls_medium_linear'),
    Contender('vil_ls_medium', 'composite'), Contender('vil_ls_medium_linear', 'composite'))


@contextlib.contextmanager
def backend_of(contender: Contender) -> Iterator[None]:
    """A block in which its backend is the default."""
    before = os.environ.get(BACKEND_ENV)
    if contender.backend is not None:
        os.environ[BACKEND_ENV] = contender.backend
    try:
        yield
    finally:
        if contender.backend is not None:
            del os.environ[BACKEND_ENV]
            if before is not None:
                os.environ[BACKEND_ENV] = before


class Workload(NamedTuple):
    """What is measured of each model."""
    img_size: int
    training: bool
    compiled: bool
    dtype: torch.dtype
    device: torch.device
    largest_batch: int

    def call(self, contender: Contender, batch: int) -> Callable[[], Any]:
        """Inference or a training step without the optimiser's update."""
        kwargs: dict[str, Any] = {} if 'convnext' in contender.model else dict(img_size=self.img_size)
        model: nn.Module = timm.create_model(contender.model, **kwargs).to(self.device, self.dtype).train(self.training)
        x = torch.randn(batch, 3, self.img_size, self.img_size, device=self.device, dtype=self.dtype)
        forward = torch.compile(model) if self.compiled else model

        def run() -> None:
            with backend_of(contender), torch.set_grad_enabled(self.training):
                out = forward(x)
                if self.training:
                    model.zero_grad()
                    out.float().logsumexp(-1).mean().backward()

        return run


def measure_models(workload: Workload, contenders: tuple[Contender, ...], seconds: float) -> list[dict[str, Any]]:
    """A row for each contender: images per second, batch and peak memory, or why there are none."""
    rows, calls = [], {}
    for contender in contenders:
        row: dict[str, Any] = dict(
            model=str(contender), img_size=workload.img_size, mode='compiled' if workload.compiled else 'eager',
            what='training step' if workload.training else 'inference')
        rows.append(row)
        try:
            row['batch'], row['memory'] = largest_batch(workload, contender)
            calls[str(contender)] = workload.call(contender, row['batch'])
        except (RuntimeError, ValueError, AssertionError) as e:  # no memory for one image, a size that is not taken
            row['reason'] = first_line(e)
    times = alternate(calls, seconds, workload.device.type) if calls else {}
    for row in rows:
        if times.get(row['model']):
            row['images_per_second'] = row['batch'] / statistics.median(times[row['model']])
    return rows


def largest_batch(workload: Workload, contender: Contender) -> tuple[int, int]:
    """The largest power of two that fits, up to a bound, and the bytes that a call with it adds at its peak."""
    batch, memory = 1, added_memory(workload.call(contender, 1), workload.device.type)
    while batch < workload.largest_batch:
        try:
            memory = added_memory(workload.call(contender, 2 * batch), workload.device.type)
        except torch.cuda.OutOfMemoryError:
            break
        batch *= 2
    torch.cuda.empty_cache()
    return batch, memory


def measure_attention(
        device: torch.device,
        dtype: torch.dtype,
        seconds: float,
        side: int = 128,
        batch: int = 8,
        backends: tuple[str, ...] = ('triton', 'flex', 'composite'),
) -> list[dict[str, Any]]:
    """TFLOP/s of the operator by backend, and of full attention over as many tokens in pieces of 4,096.

    The FLOPs are those of products that are needed, counted alike for all.
    """
    rows = []
    for d in (32, 64):
        h = 6
        shape = batch, side, side, h, d

        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

        q, k, v = leaf(*shape), leaf(*shape), leaf(*shape)
        extra = leaf(batch, 9, h, d), leaf(batch, 9, h, d)
        calls: dict[str, Callable[[], Any]] = {
            backend: functools.partial(long_short_attention, q, k, v, 7, *extra, backend=backend)
            for backend in backends}
        tokens = min(side * side, 4096)
        full_q, full_k, full_v = (leaf(batch * side * side // tokens, h, tokens, d) for _ in range(3))
        calls['full attention, SDPA'] = functools.partial(F.scaled_dot_product_attention, full_q, full_k, full_v)
        for training in (False, True):
            for name, call in tqdm(calls.items(), desc='attention', leave=False, disable=None):
                row = dict(backend=name, head_dim=d, what='forward and backward' if training else 'forward')
                rows.append(row)
                run = functools.partial(_differentiate, call) if training else call
                try:
                    with torch.set_grad_enabled(training):
                        with FlopCounterMode(display=False) as counter:
                            run()
                        times = alternate({name: run}, seconds, device.type)[name]
                    row['tflops'] = counter.get_total_flops() / statistics.median(times) / 1e12
                except (RuntimeError, ValueError) as e:
                    row['reason'] = first_line(e)
    return rows


def _differentiate(call: Callable[[], torch.Tensor]) -> None:
    call().float().square().sum().backward()


def measure_memory(device: torch.device, dtype: torch.dtype, side: int = 256) -> list[dict[str, Any]]:
    """Bytes that a training step of one layer adds at its peak, by backend, on side x side tokens."""
    rows = []
    for contender in (Contender('layer'), Contender('layer', 'composite')):
        layer = LongShortAttention2d(192, 6, window_size=7, rank=8, num_global_tokens=1, device=device, dtype=dtype)
        x = torch.randn(1, 1 + side * side, 192, device=device, dtype=dtype, requires_grad=True)

        def step(layer: nn.Module = layer, x: torch.Tensor = x, contender: Contender = contender) -> None:
            with backend_of(contender):
                layer(x, (side, side)).float().square().sum().backward()

        step()
        memory = added_memory(step, device.type)
        rows.append(dict(backend=contender.backend or 'default', tokens=side * side, memory=memory))
    return rows


def report(models: list[dict[str, Any]], attention: list[dict[str, Any]], memory: list[dict[str, Any]]) -> str:
    """All tables as Markdown; models' speeds relative to Swin-S under the same conditions."""
    swin = {(r['img_size'], r['what'], r['mode']): r.get('images_per_second') for r in models if r['model'] == SWIN}

    def relative(row: dict[str, Any]) -> str:
        base = swin.get((row['img_size'], row['what'], row['mode']))
        return f'{row["images_per_second"] / base:.2f}' if base and 'images_per_second' in row else ''

    def number(key: str, unit: float = 1., digits: int = 1) -> Callable[[dict[str, Any]], str]:
        return lambda row: f'{row[key] / unit:.{digits}f}' if key in row else row.get('reason', '')

    return '\n\n'.join((
        markdown(models, {
            'model': lambda row: row['model'], 'px': lambda row: str(row['img_size']),
            'what': lambda row: f'{row["what"]}, {row["mode"]}', 'batch': lambda row: str(row.get('batch', '')),
            'images/s': number('images_per_second'), 'Swin-S = 1': relative, 'GiB': number('memory', 2 ** 30, 2)}),
        markdown(attention, {
            'attention': lambda row: row['backend'], 'head width': lambda row: str(row['head_dim']),
            'what': lambda row: row['what'], 'TFLOP/s': number('tflops')}),
        markdown(memory, {
            'backend': lambda row: row['backend'], 'tokens': lambda row: str(row['tokens']),
            'MiB of a step': number('memory', 2 ** 20)})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='where the dated files go')
    parser.add_argument('--seconds', type=float, default=10., help='for each comparison')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('there is no GPU to measure')
    device, dtype = torch.device('cuda'), torch.bfloat16
    models = []
    workloads = [
        Workload(size, training, compiled, dtype, device, LARGEST_BATCH)
        for compiled in (False, True) for size in SIZES for training in (True, False)]
    for workload in tqdm(workloads, desc='models', disable=None):
        # tiles are no contender when compiled
        contenders = CONTENDERS[:4] if workload.compiled else CONTENDERS
        models += measure_models(workload, contenders, args.seconds)
    attention, memory = measure_attention(device, dtype, args.seconds / 5), measure_memory(device, dtype)
    path = args.folder / f'gpu_bfloat16_{datetime.date.today():%Y-%m-%d}'
    write(path, describe_machine('cuda', 'bfloat16', torch.get_num_threads()), [*models, *attention, *memory],
          report(models, attention, memory))
    print(path.with_name(path.name + '.md').read_text())


if __name__ == '__main__':
    main()
