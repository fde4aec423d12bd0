#!/usr/bin/env python3
"""Whole models against timm's Swin-S, and how the cost of a linear model grows with the image.

    python benchmarks/models.py                                 # float32 on the CPU
    python benchmarks/models.py --device cuda --dtype bfloat16
    python benchmarks/models.py --only growth
    python benchmarks/models.py --compare vil_ls_small_linear,640,2

A model's time is compared with that of `swin_small_patch4_window7_224`, built for the same image size, on the same
images: both take turns in one process, and medians of ratios of the same round are printed. Growth is the slope of log
time and of log peak memory against log tokens, by least squares. Results go to benchmarks/results/, a JSON file and a
Markdown table, after every comparison.
"""
import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from tqdm import tqdm

import ls_vision  # noqa: F401  registers the models
from ls_vision.analysis.measure import (
    added_memory,
    alternate,
    describe_machine,
    ratio,
    slope,
    spread,
    write_as_measured,
)

RESULTS = Path(__file__).parent / 'results'
BASELINE = 'swin_small_patch4_window7_224'
GROWTH_MODEL = 'vil_ls_medium_linear'
GROWTH_SIZES = (224, 448, 896, 1792)


class Case(NamedTuple):
    """Model, side of the images in pixels, batch."""
    model: str
    img_size: int
    batch: int


CASES = [
    Case(model, img_size, batch)
    for model, img_size in (
        ('vil_ls_medium', 224), ('vil_ls_medium', 448), ('vil_ls_medium_linear', 448), ('vil_ls_medium_linear', 896))
    for batch in (1, 8)
]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.measure_memory:
        print(memory_of(args.compare[0], args))
        return
    machine = describe_machine(args.device, args.dtype, args.threads)
    path = args.out / f'models_{args.device}_{args.dtype}_{datetime.date.today():%Y-%m-%d}'
    calls = [functools.partial(compare, case, args) for case in args.compare if args.only != 'growth']
    calls += [
        functools.partial(measure_growth, Case(GROWTH_MODEL, size, 1), args) for size in GROWTH_SIZES
        if args.only != 'compare']
    write_as_measured(path, machine, (call() for call in tqdm(calls, desc='cases', disable=None)), markdown)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of PyTorch on the CPU')
    parser.add_argument('--compare', nargs='+', type=parse_case, default=CASES, metavar='MODEL,PIXELS,BATCH')
    parser.add_argument('--only', choices=['compare', 'growth'], help='leave out the other part')
    parser.add_argument('--seconds', type=float, default=30., help='of timing a case, three rounds or more')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--measure-memory', action='store_true', help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def parse_case(text: str) -> Case:
    try:
        model, img_size, batch = text.split(',')
        return Case(model, int(img_size), int(batch))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: expected {",".join(Case._fields)}') from None


def build(name: str, case: Case, args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    """A model in evaluation and images for it."""
    torch.manual_seed(0)
    size = {} if name.startswith(('vil_', 'cvt_')) else dict(img_size=case.img_size)
    dtype = getattr(torch, args.dtype)
    model = timm.create_model(name, **size).eval().to(device=args.device, dtype=dtype)
    return model, torch.randn(case.batch, 3, case.img_size, case.img_size, device=args.device, dtype=dtype)


@torch.inference_mode()
def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Times of the model and of the baseline, and their ratio."""
    calls = {}
    for kind, name in (('model', case.model), ('baseline', BASELINE)):
        model, images = build(name, case, args)
        calls[kind] = lambda model=model, images=images: model(images)
    times = alternate(calls, args.seconds, args.device)
    return dict(
        **case._asdict(), rounds=len(times['model']), ratio=ratio(times['model'], times['baseline']),
        seconds={kind: statistics.median(seconds) for kind, seconds in times.items()})


@torch.inference_mode()
def measure_growth(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Time of the model, and its peak memory in a process of its own."""
    model, images = build(case.model, case, args)
    seconds = alternate({'model': lambda: model(images)}, args.seconds, args.device)['model']
    command = [
        sys.executable, __file__, '--measure-memory', '--compare', ','.join(map(str, case)), '--device', args.device,
        '--dtype', args.dtype, '--threads', str(args.threads)]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return dict(**case._asdict(), rounds=len(seconds), growth=dict(seconds=statistics.median(seconds), memory=memory))


@torch.inference_mode()
def memory_of(case: Case, args: argparse.Namespace) -> int:
    """Bytes of a forward pass at its peak, besides model and images."""
    model, images = build(case.model, case, args)
    small = images[..., :64, :64]
    model(small)  # what libraries set up on their first call is not the image's
    return added_memory(lambda: model(images), args.device)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = []
    compared, growth = [r for r in rows if 'ratio' in r], [r for r in rows if 'growth' in r]
    if compared:
        lines += [f'Forward pass against `{BASELINE}`; medians, quartiles in brackets.', '',
                  '| model | pixels | batch | ms | Swin-S, ms | ratio | rounds |', '|---|---|---|---|---|---|---|']
        lines += [
            f'| {r["model"]} | {r["img_size"]} | {r["batch"]} | {r["seconds"]["model"] * 1e3:.0f} | '
            f'{r["seconds"]["baseline"] * 1e3:.0f} | {spread(r["ratio"])} | {r["rounds"]} |' for r in compared]
    if growth:
        lines += ['', f'Forward pass of `{GROWTH_MODEL}`, one image.', '',
                  '| pixels | s | peak memory, MB |', '|---|---|---|']
        lines += [
            f'| {r["img_size"]} | {r["growth"]["seconds"]:.3f} | {r["growth"]["memory"] / 2 ** 20:.0f} |'
            for r in growth]
    if len(growth) > 1:
        tokens = [r['img_size'] ** 2 for r in growth]
        slopes = {key: slope(tokens, [r['growth'][key] for r in growth]) for key in ('seconds', 'memory')}
        lines += ['', f'Slope of log time against log tokens {slopes["seconds"]:.3f}, '
                      f'of log peak memory {slopes["memory"]:.3f}.']
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
