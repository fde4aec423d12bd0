#!/usr/bin/env python3
"""Time and memory of the long-short attention layer, next to what it replaces.

    python benchmarks/attention.py                               # float32 on the CPU
    python benchmarks/attention.py --device cuda --dtype bfloat16
    python benchmarks/attention.py --layers 96,3,56,7,8,1,4 --backends blocked --seconds 10

The backends, full attention (SDPA without a bias) and the layer's floor are measured against a layer that copies keys
and values into overlapping tiles, as the released code does. All take turns in one process,
in a new order each round; a ratio is that of two times of the same round, and medians of these are what is printed, so
that a noisy machine distorts them little. Memory on the CPU is the resident size that a step adds, each in a process
of its own. Results go to benchmarks/results/, a JSON file and a Markdown table, after every layer.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import Floor, TileCopying, full_attention
from torch import Tensor, nn
from tqdm import tqdm

from ls_vision.analysis.measure import added_memory, alternate, describe_machine, ratio, spread, write_as_measured
from ls_vision.layers import LongShortAttention2d
from ls_vision.ops.backends import BACKEND_ENV, BACKENDS

RESULTS = Path(__file__).parent / 'results'
PASSES = ('forward', 'step')
# Full attention and the dense reference hold N x N logits for each head, or take as long as if they did.
DENSE_TOKENS = 20_000
REFERENCE_LOGITS = 2 ** 28


class Layer(NamedTuple):
    """dim, heads, side of the grid, window, rank, global tokens, batch."""
    dim: int
    num_heads: int
    side: int
    window_size: int
    rank: int
    num_global_tokens: int
    batch: int

    @property
    def num_tokens(self) -> int:
        return self.side ** 2

    def __str__(self) -> str:
        return (f'{self.dim} channels, {self.num_heads} heads, {self.side} x {self.side}, w {self.window_size}, '
                f'r {self.rank}, g {self.num_global_tokens}, batch {self.batch}')


# three that the floor is known for, those of the models over grids from 14 to 256, and one of 65,536 tokens
LAYERS = [
    Layer(96, 3, 56, 7, 8, 1, 4),
    Layer(192, 3, 28, 7, 8, 1, 4),
    Layer(96, 3, 112, 7, 8, 1, 1),
    Layer(384, 6, 14, 7, 8, 1, 8),
    Layer(96, 3, 96, 8, 8, 1, 2),
    Layer(64, 1, 56, 8, 64, 0, 4),
    Layer(384, 6, 14, 2, 4, 0, 8),
    Layer(96, 3, 256, 7, 8, 1, 1),
    Layer(320, 5, 128, 2, 4, 0, 1),
    Layer(1280, 16, 256, 2, 4, 0, 1),
]


def main() -> None:
    args = parse_args()
    if args.measure_memory:
        print(json.dumps(memory_of(args.layers[0], args.measure_memory, args)))
        return
    torch.set_num_threads(args.threads)
    name = f'attention_{args.device}_{args.dtype}_{datetime.date.today():%Y-%m-%d}'
    machine = describe_machine(args.device, args.dtype, args.threads)
    layers = tqdm(args.layers, desc='layers', disable=None)
    write_as_measured(
        args.out / name, machine, (row for layer in layers for row in measure_layer(layer, args)), markdown)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of PyTorch on the CPU')
    parser.add_argument('--backends', nargs='+', choices=BACKENDS, help='default: those that are fast on the device')
    parser.add_argument('--layers', nargs='+', type=parse_layer, default=LAYERS, metavar='C,h,side,w,r,g,B')
    parser.add_argument('--seconds', type=float, default=20., help='of timing a layer and pass, three rounds or more')
    parser.add_argument('--no-memory', action='store_true', help='time alone')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--measure-memory', help=argparse.SUPPRESS)  # one contender, in this process
    args = parser.parse_args()
    args.backends = args.backends or (['blocked', 'triton', 'flex'] if args.device == 'cuda' else ['blocked'])
    return args


def parse_layer(text: str) -> Layer:
    try:
        return Layer(*map(int, text.split(',')))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f'{text!r}: expected seven numbers, {",".join(Layer._fields)}') from None


class Contender:
    """A layer, its input, and the backend it runs with."""

    def __init__(self, kind: str, layer: Layer, args: argparse.Namespace):
        torch.manual_seed(0)
        self.kind = kind
        like = dict(device=args.device, dtype=getattr(torch, args.dtype))
        self.feat_size = (layer.side, layer.side)
        rel_pos_bias = 'released' if layer.window_size >= 7 and layer.num_global_tokens else None
        module: nn.Module = LongShortAttention2d(
            layer.dim, layer.num_heads, window_size=layer.window_size, rank=layer.rank,
            num_global_tokens=layer.num_global_tokens, rel_pos_bias=rel_pos_bias, **like)  # type: ignore[arg-type]
        if kind == 'tiles':
            module = TileCopying(module)
        elif kind == 'floor':
            module = Floor(module, layer.batch, self.feat_size)
        elif kind == 'full':
            module = full_attention(module)
        self.module = module
        self.x = torch.randn(layer.batch, layer.num_global_tokens + layer.num_tokens, layer.dim, **like)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind in BACKENDS:
            os.environ[BACKEND_ENV] = self.kind
        out = self.module(x, self.feat_size)
        return out if isinstance(out, tuple) else (out,)

    def forward(self) -> None:
        with torch.inference_mode():
            self(self.x)

    def step(self) -> None:
        """Forward and backward, gradients of the input and of all parameters."""
        x = self.x.detach().requires_grad_()
        out = self(x)
        torch.autograd.backward(out, [torch.ones((), dtype=o.dtype, device=o.device).expand_as(o) for o in out])
        self.module.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """Bytes that are kept for the backward pass, each storage once, parameters left out."""
        own = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        storages: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = self(self.x.detach().requires_grad_())
        total = sum(storages.values())
        del out
        return total


def contenders(layer: Layer, args: argparse.Namespace) -> list[str]:
    kinds = ['tiles', *args.backends, 'floor']
    if layer.num_heads * layer.batch * layer.num_tokens ** 2 > REFERENCE_LOGITS and 'reference' in kinds:
        kinds.remove('reference')
    if layer.num_tokens <= DENSE_TOKENS or args.device == 'cuda':
        kinds.append('full')
    return kinds


def measure_layer(layer: Layer, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each contender."""
    kinds = contenders(layer, args)
    rows = {kind: dict(layer=layer._asdict(), contender=kind) for kind in kinds}
    if not args.no_memory:
        for kind in tqdm(kinds, desc='memory', leave=False, disable=None):
            rows[kind].update(memory_in_new_process(layer, kind, args))
    alive = {kind: Contender(kind, layer, args) for kind in kinds if 'error' not in rows[kind]}
    for name in PASSES:
        times = alternate({kind: getattr(c, name) for kind, c in alive.items()}, args.seconds, args.device)
        for kind, seconds in times.items():
            rows[kind][name] = dict(
                seconds=statistics.median(seconds), rounds=len(seconds),
                to_tiles=ratio(seconds, times['tiles']), to_floor=ratio(seconds, times['floor']))
    return iter(rows.values())


def memory_in_new_process(layer: Layer, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `memory_of` says in a process of its own; an error where that process was killed."""
    command = [
        sys.executable, __file__, '--measure-memory', kind, '--layers', ','.join(map(str, layer)),
        '--device', args.device, '--dtype', args.dtype, '--threads', str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1:] or [f'killed by signal {-done.returncode}']
        return dict(error=message[0])
    return json.loads(done.stdout)


def memory_of(layer: Layer, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Bytes per byte of input: kept for the backward pass, and the peak of a training step above what was there."""
    torch.set_num_threads(args.threads)
    contender = Contender(kind, layer, args)
    contender_input = contender.x.nbytes
    saved = contender.saved_bytes()
    peak = added_memory(contender.step, args.device)
    return dict(saved=saved / contender_input, peak=peak / contender_input, input_bytes=contender_input)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        'Ratios are medians over rounds (quartiles in brackets): times of the tile-copying layer, of the floor; bytes '
        'kept for the backward pass and peak memory of a step over the bytes of the input.', '',
        '| layer | contender | forward, ms | to tiles | to floor | step, ms | to tiles | to floor | kept | peak |',
        '|---|---|---|---|---|---|---|---|---|---|']
    for row in rows:
        cells = [str(Layer(**row['layer'])), row['contender']]
        for name in PASSES:
            result = row.get(name)
            if result is None:
                cells += [row.get('error', ''), '', '']
            else:
                cells += [f'{result["seconds"] * 1e3:.1f}', spread(result['to_tiles']), spread(result['to_floor'])]
        cells += [f'{row[key]:.2f}' if key in row else '' for key in ('saved', 'peak')]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
