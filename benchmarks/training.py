#!/usr/bin/env python3
"""Training steps and inference of whole models against timm's Swin-S and ConvNeXt-S, and where a step's time goes.

    python benchmarks/training.py                              # everything, float32, about half an hour on two cores
    python benchmarks/training.py --dtype bfloat16             # autocast
    python benchmarks/training.py --compile --only step        # both sides by torch.compile
    python benchmarks/training.py --cases vil_ls_tiny,224,8,step,swin_tiny_patch4_window7_224 --seconds 10

A step is forward, loss and backward, without the optimiser. All models of a case take turns in one process, in a new
order each round; ratios are those of times of the same round, of which medians and quartiles are printed. `linear` is
the time of the model's own linear maps alone, forward and backward, over the first contender's whole time, and `free`
that of the whole model with the products of its attention left out: no faster attention gets below it. Shares are self
times of one step in PyTorch's profiler, by kind of operation, after a warm-up.

Results go to benchmarks/results/, a JSON file and a Markdown table, after every case. As without AVX-512:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/training.py
"""
import argparse
import contextlib
import datetime
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import ls_vision  # noqa: F401  registers the models
from ls_vision.analysis.measure import alternate, describe_machine, ratio, spread, write_as_measured
from ls_vision.analysis.zoo import build
from ls_vision.layers import full_attention, long_short_attention
from ls_vision.runtime.arguments import positive_int, positive_number
from ls_vision.runtime.errors import UserError

LIMITS = ('ONEDNN_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY', 'MKL_ENABLE_INSTRUCTIONS')
RESULTS = Path(__file__).parent / 'results'
SWIN, CONVNEXT = 'swin_small_patch4_window7_224', 'convnext_small'
MODES = ('inference', 'step')
KINDS = (  # of operations, by the first pattern that their names match
    ('linear maps', r'aten::(mm|addmm|linear)$|mkldnn::_linear'),
    ('attention products', r'aten::(bmm|baddbmm|matmul|einsum)$|flash_attention|scaled_dot_product'),
    ('convolutions', r'convolution|conv2d'),
    ('norms', r'layer_norm|batch_norm'),
    ('softmax and GELU', r'softmax|gelu'),
    ('copies', r'copy_|cat$|clone|contiguous|pad|index_select|index_put|fill_|zero_'),
    ('sums and products of entries', r'aten::(add|add_|sum|mul|mul_|sub|sub_|div|where|all|isneginf|masked_fill_?)$'),
)


class Case(NamedTuple):
    """Model, side of the images in pixels, batch, inference or step, and the models that it is compared with."""
    model: str
    img_size: int
    batch: int
    mode: str
    against: tuple[str, ...]


CASES = [
    Case('vil_ls_medium', 224, 8, 'step', (SWIN, CONVNEXT)),
    *(Case('vil_ls_medium_linear', size, batch, 'step', (SWIN, CONVNEXT))
      for size, batch in ((448, 2), (672, 1), (1024, 1))),
    *(Case(f'vil_ls_{size}_linear', 224, 4, mode, (f'vil_ls_{size}',))
      for size in ('tiny', 'small', 'medium', 'base') for mode in MODES),
    *(Case('vil_ls_medium', 224, batch, 'inference', (SWIN, CONVNEXT)) for batch in (1, 8)),
    *(Case('vil_ls_medium_linear', size, batch, 'inference', (SWIN, CONVNEXT)) for size in (448, 896)
      for batch in (1, 8)),
]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = args.dtype if args.dtype == 'float32' else f'{args.dtype} autocast'
    machine = dict(
        describe_machine('cpu', dtype, args.threads), instructions=torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in LIMITS if name in os.environ})
    name = '_'.join([
        'training_cpu', args.dtype, machine['instructions'].lower().replace(' ', ''),
        *(['compiled'] if args.compile else []), f'{datetime.date.today():%Y-%m-%d}'])
    cases = tqdm([case for case in args.cases if case.mode in args.only], desc='cases', disable=None)
    try:
        write_as_measured(args.out / name, machine, (compare(case, args) for case in cases), markdown)
    except UserError as e:
        sys.exit(f'error: {e}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--threads', type=positive_int, default=torch.get_num_threads(), help='of PyTorch')
    parser.add_argument('--cases', nargs='+', type=parse_case, default=CASES,
                        metavar='MODEL,PIXELS,BATCH,MODE,MODEL')
    parser.add_argument('--only', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--compile', action='store_true', help='both sides by torch.compile')
    parser.add_argument('--seconds', type=positive_number, default=40., help='of timing a case, three rounds or more')
    parser.add_argument('--out', type=Path, default=RESULTS)
    return parser.parse_args()


def parse_case(text: str) -> Case:
    try:
        model, img_size, batch, mode, *against = text.split(',')
        names = (model, *against)
        if mode in MODES and against and len(set(names)) == len(names) and all(map(timm.is_model, names)):
            return Case(model, positive_int(img_size), positive_int(batch), mode, tuple(against))
    except (ValueError, argparse.ArgumentTypeError):
        pass
    raise argparse.ArgumentTypeError(
        f'{text!r}: expected the name of a model, pixels, batch, {" or ".join(MODES)}, and other models to compare it '
        'with.')


class Contender:
    """A model and a batch for it; a call is a step or a forward pass."""

    def __init__(self, name: str, case: Case, args: argparse.Namespace):
        torch.manual_seed(0)
        self.model = build(name, (case.img_size, case.img_size)).train(case.mode == 'step')
        for module in self.model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.  # whole blocks would be left out of some rounds
        self.images = torch.randn(case.batch, 3, case.img_size, case.img_size)
        self.targets = torch.randint(1000, (case.batch,))
        self.trains = case.mode == 'step'
        self.autocast = args.dtype == 'bfloat16'
        self.forward = torch.compile(self.model) if args.compile else self.model

    def __call__(self) -> None:
        with torch.inference_mode(not self.trains), torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
            out = self.forward(self.images)
        if self.trains:
            self.model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(out.float(), self.targets).backward()

    def linear_maps(self) -> Callable[[], None]:
        """A call of the model's linear maps alone, on inputs of the shapes that they get."""
        shapes: list[tuple[nn.Linear, torch.Size]] = []

        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            shapes.append((module, inputs[0].shape))

        hooks = [m.register_forward_pre_hook(record) for m in self.model.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            self.model(self.images)
        for hook in hooks:
            hook.remove()
        tensors = {shape: torch.randn(shape) for _, shape in shapes}

        def call() -> None:
            self.model.zero_grad(set_to_none=True)
            with torch.inference_mode(not self.trains), torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
                for module, shape in shapes:
                    if self.trains:
                        out = module(tensors[shape].detach().requires_grad_())
                        out.backward(torch.ones_like(out))
                    else:
                        module(tensors[shape])

        return call

    def without_attention(self) -> None:
        """A call in which local attention costs nothing."""
        with free_attention():
            self()

    def shares(self) -> dict[str, float]:
        """Parts of the time of a call by kind of operation, in percent."""
        with profile(activities=[ProfilerActivity.CPU]) as record:
            self()
        found = dict.fromkeys([*(kind for kind, _ in KINDS), 'other'], 0.)
        for event in record.key_averages():
            kind = next((kind for kind, pattern in KINDS if re.search(pattern, event.key)), 'other')
            found[kind] += event.self_cpu_time_total
        total = sum(found.values())
        return {kind: 100 * time / total for kind, time in found.items()}


@contextlib.contextmanager
def free_attention() -> Iterator[None]:
    """A block in which tokens attend to nothing: outputs are sums of what goes in, so that all of it has gradients.

    Summaries are still computed, and so is what global tokens of long-short attention attend to.
    """
    def attend(query: Tensor, pair: Tensor, window: object, additional: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return query + pair.sum(3) + additional.sum((1, 2))[:, None, None], query

    def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return q + k + v

    with mock.patch.object(long_short_attention, 'attend', attend), \
            mock.patch.object(full_attention, 'dot_product_attention', dot_product_attention):
        yield


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Times of a case's models in turn, ratios to the others, and where the time of a step goes in the first two."""
    names = (case.model, *case.against)
    if args.compile:
        torch.compiler.reset()  # else sizes that differ from those of the last case are compiled as open ones
    contenders = {name: Contender(name, case, args) for name in names}
    calls: dict[str, Callable[[], None]] = dict(contenders)
    if not args.compile:
        calls['linear'] = contenders[case.model].linear_maps()
        calls['free'] = contenders[case.model].without_attention
    times = alternate(calls, args.seconds)
    profiled = names[:2] if case.mode == 'step' and not args.compile else ()  # a profiler sees others in inference
    return dict(
        **case._asdict(), compiled=args.compile, rounds=len(times[case.model]),
        ratios={name: ratio(times[case.model], times[name]) for name in case.against},
        **{name: ratio(times[name], times[case.against[0]]) if name in times else None for name in ('linear', 'free')},
        seconds={name: statistics.median(seconds) for name, seconds in times.items()},
        shares={name: contenders[name].shares() for name in profiled})


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        'Time over the time of another model; medians, quartiles in brackets.', '',
        '| model | pixels | batch | | against | ms | its ms | ratio | linear maps alone | '
        'attention left out | rounds |', '|---' * 11 + '|']
    for row in rows:
        for i, name in enumerate(row['against']):
            lines.append(
                f'| {row["model"]} | {row["img_size"]} | {row["batch"]} | {row["mode"]} | {name} | '
                f'{row["seconds"][row["model"]] * 1e3:.0f} | {row["seconds"][name] * 1e3:.0f} | '
                f'{spread(row["ratios"][name])} | '
                + ''.join(f'{spread(row[floor]) if row[floor] and i == 0 else ""} | ' for floor in ('linear', 'free'))
                + f'{row["rounds"]} |')
    if any(row['shares'] for row in rows):
        kinds = [*(kind for kind, _ in KINDS), 'other']
        lines += ['', 'Shares of the time, %.', '', f'| model | pixels | batch | | {" | ".join(kinds)} |',
                  '|---' * (4 + len(kinds)) + '|']
        lines += [
            f'| {name} | {row["img_size"]} | {row["batch"]} | {row["mode"]} | '
            f'{" | ".join(f"{shares[kind]:.1f}" for kind in kinds)} |'
            for row in rows for name, shares in row['shares'].items()]
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
