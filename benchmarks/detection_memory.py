#!/usr/bin/env python3
"""Training step of a backbone with a feature pyramid on large images: seconds and peak memory, each in its own process.

    python benchmarks/detection_memory.py                                         # all models and sizes
    python benchmarks/detection_memory.py --models vil_ls_medium_linear --sizes 2048,2048 --detector fcos
    python benchmarks/detection_memory.py --device cuda --amp

A step is forward, backward and an AdamW update on one image; memory is the peak of the process (of the allocator on a
GPU), optimiser and weights included. Images are padded to multiples of 32 pixels, as torchvision's detectors do. A case
that exceeds --memory-limit is recorded as out of memory. Results go to benchmarks/results/, a JSON file and a Markdown
table, after every case; the same command resumes an interrupted run.
"""
import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import ls_vision  # noqa: F401  registers the models
from ls_vision.analysis.measure import describe_machine, peak_resident_size, write_as_measured
from ls_vision.detection import DETECTORS, build_detector
from ls_vision.detection.backbone import PyramidBackbone
from ls_vision.runtime.devices import is_out_of_memory

RESULTS = Path(__file__).parent / 'results'
MODELS = ['vil_ls_medium_linear', 'vil_ls_medium', 'vil_full_medium', 'swin_small_patch4_window7_224']
SIZES = [(512, 512), (800, 1333), (1024, 1024), (1536, 1536), (2048, 2048)]
OUT_OF_MEMORY = 3  # exit code of a case


def main() -> None:
    args = parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args)))
        return
    machine = describe_machine(args.device, 'bfloat16 autocast' if args.amp else 'float32', args.threads)
    checkpointing = '_checkpointing' if args.grad_checkpointing else ''
    name = f'detection_memory_{args.detector or "fpn"}{checkpointing}_{args.device}_{datetime.date.today():%Y-%m-%d}'
    rows = saved_rows(args.out / f'{name}.json', machine['command'])
    measured = {(row['model'], (row['height'], row['width'])) for row in rows}
    missing = (
        (model, size) for model in args.models
        for size in tqdm([s for s in args.sizes if (model, s) not in measured], desc=model, disable=None))
    new = (dict(model=model, height=size[0], width=size[1], **run_case(model, size)) for model, size in missing)
    write_as_measured(args.out / name, machine, new, lambda rows: markdown(rows, args), rows)


def saved_rows(path: Path, command: str) -> list[dict[str, Any]]:
    """Earlier results of the same command; a case that failed for another reason than memory is repeated."""
    saved = json.loads(path.read_text()) if path.exists() else dict(machine={}, rows=[])
    same = saved['machine'].get('command') == command
    return [row for row in saved['rows'] if same and row.get('error') in (None, 'out of memory')]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help='timm model names')
    parser.add_argument('--sizes', nargs='+', type=parse_size, default=SIZES, metavar='H,W', help='image sizes')
    parser.add_argument('--detector', choices=tuple(DETECTORS), help='with the whole detector, on 20 boxes')
    parser.add_argument('--grad-checkpointing', action='store_true', help="recompute the backbone's blocks")
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of PyTorch on the CPU')
    parser.add_argument('--steps', type=int, default=2, help='steps of a case; the fastest one counts')
    parser.add_argument('--memory-limit', type=float, default=20., metavar='GIB', help='for a process on the CPU')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--case', nargs=3, metavar=('MODEL', 'H', 'W'), help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: expected H,W in pixels') from None
    return height, width


def run_case(model: str, size: tuple[int, int]) -> dict[str, Any]:
    """Seconds and memory, measured in a process of its own, or the error."""
    command = [sys.executable, __file__, *sys.argv[1:], '--case', model, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (OUT_OF_MEMORY, -9):  # refused, or killed by the system
        return dict(error='out of memory')
    return dict(error=(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])


def measure(model: str, height: str, width: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a training step and bytes at its peak."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == 'cpu':
        limit = int(args.memory_limit * 2 ** 30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        step = make_step(model, (int(height), int(width)), args)
        seconds = []
        for _ in range(args.steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            sys.exit(OUT_OF_MEMORY)
        raise
    memory = torch.cuda.max_memory_allocated() if args.device == 'cuda' else peak_resident_size()
    return dict(seconds=min(seconds), memory=memory)


def make_step(name: str, size: tuple[int, int], args: argparse.Namespace) -> Any:
    """A training step on one image."""
    model: nn.Module
    if args.detector:
        model = build_detector(args.detector, name, 80, grad_checkpointing=args.grad_checkpointing)
    else:
        model = PyramidBackbone(name, grad_checkpointing=args.grad_checkpointing)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters())
    if not args.detector:
        size = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    image = torch.rand(3, *size, device=args.device)
    corners = torch.rand(20, 2, device=args.device) * (min(size) - 64)
    target = dict(
        boxes=torch.cat([corners, corners + 64], 1), labels=torch.ones(20, dtype=torch.long, device=args.device))

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            if args.detector:
                loss = sum(model([image], [target]).values())
            else:
                loss = sum(x.float().square().mean() for x in model(image[None]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.device == 'cuda':
            torch.cuda.synchronize()

    return step


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    what = args.detector or 'feature pyramid'
    extra = ', with gradient checkpointing' if args.grad_checkpointing else ''
    lines = [f'Training step of backbone and {what} on one image{extra}; limit {args.memory_limit:g} GiB.', '',
             '| model | pixels | s | peak memory, GiB |', '|---|---|---|---|']
    for r in rows:
        figures = f'{r["error"]} |' if 'error' in r else f'{r["seconds"]:.2f} | {r["memory"] / 2 ** 30:.2f}'
        lines.append(f'| {r["model"]} | {r["height"]} x {r["width"]} | {figures} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
