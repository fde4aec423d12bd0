#!/usr/bin/env python3
"""Time and memory of attention over sequences, next to what it replaces.

    python benchmarks/sequence_attention.py                          # all parts, two threads, float32
    python benchmarks/sequence_attention.py --parts causal --seconds 60

* bidirectional: a step (forward and backward) of `LongShortAttention1d` against a layer that copies tiles the way the
  released code does, and against full attention (SDPA).
* causal: the same of `CausalLongShortAttention1d`, and the bytes that each keeps for the backward pass.
* decoding: time and state of one more token after 1k to 64k, against full attention with a key-value cache.

Contenders take turns in one process, in a new order each round; a ratio is that of two times of the same round. Results
go to benchmarks/results/, a JSON file and a Markdown table.
"""
import argparse
import datetime
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sequence_contenders import FullAttention1d, TileCopying1d, TileCopyingCausal
from torch import Tensor, nn
from tqdm import tqdm

from ls_vision.analysis.measure import alternate, describe_machine, ratio, spread, write
from ls_vision.layers import CausalLongShortAttention1d, LongShortAttention1d

RESULTS = Path(__file__).parent / 'results'
PARTS = ('bidirectional', 'causal', 'decoding')


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    if 'bidirectional' in args.parts:
        for N in args.lengths:
            rows += measure_bidirectional(N, args.seconds)
    if 'causal' in args.parts:
        rows += measure_causal(max(args.lengths), args.seconds)
    if 'decoding' in args.parts:
        rows += measure_decoding(args.decode, args.seconds)
    name = f'sequence_attention_cpu_float32_{datetime.date.today():%Y-%m-%d}'
    write(args.out / name, describe_machine('cpu', 'float32', args.threads), rows, markdown(rows))
    print((args.out / f'{name}.md').read_text())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--lengths', nargs='+', type=int, default=[2048, 4096], help='tokens; multiples of the window')
    parser.add_argument('--decode', nargs='+', type=int, default=[1024, 4096, 16384, 65536], help='tokens before')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--seconds', type=float, default=20., help='of timing for each part and length')
    parser.add_argument('--out', type=Path, default=RESULTS)
    return parser.parse_args()


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, gradients of the input and of all parameters."""
    def run() -> None:
        y = module(x.detach().requires_grad_())
        y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
        module.zero_grad(set_to_none=True)
    return run


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that are kept for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x.detach().requires_grad_())
    return sum(storages.values())


def measure_steps(part: str, modules: dict[str, nn.Module], x: Tensor, seconds: float) -> list[dict[str, Any]]:
    times = alternate({name: step(module, x) for name, module in modules.items()}, seconds)
    return [dict(
        part=part, tokens=x.shape[1], contender=name, seconds=statistics.median(times[name]), rounds=len(times[name]),
        to_long_short=ratio(times[name], times['long-short']), saved=saved_bytes(module, x))
        for name, module in modules.items()]


def measure_bidirectional(N: int, seconds: float) -> list[dict[str, Any]]:
    layer = LongShortAttention1d(64, 2, window_size=8, rank=32)
    modules = {'long-short': layer, 'tiles': TileCopying1d(layer), 'full': FullAttention1d(64, 2)}
    return measure_steps('bidirectional', modules, torch.randn(4, N, 64), seconds)


def measure_causal(N: int, seconds: float) -> list[dict[str, Any]]:
    layer = CausalLongShortAttention1d(512, 8, window_size=min(512, N), chunk_size=16)
    modules = {'long-short': layer, 'tiles': TileCopyingCausal(layer), 'full': FullAttention1d(512, 8, causal=True)}
    return measure_steps('causal', modules, torch.randn(1, N, 512), seconds)


@torch.inference_mode()
def measure_decoding(lengths: list[int], seconds: float) -> list[dict[str, Any]]:
    layer = CausalLongShortAttention1d(512, 8, window_size=512, chunk_size=16).eval()
    full = FullAttention1d(512, 8).eval()
    token, state, rows = torch.randn(1, 1, 512), None, []
    for N in tqdm(sorted(lengths), desc='decoding', disable=None):
        seen = 0 if state is None else state.num_tokens
        for part in torch.randn(1, N - seen, 512).split(4096, dim=1):
            _, state = layer(part, state=state)
        assert state is not None
        cache = (torch.randn(1, 8, N + 1, 64), torch.randn(1, 8, N + 1, 64))
        kept: Any = state
        times = alternate({
            'long-short': lambda kept=kept: layer(token, state=kept),
            'full': lambda cache=cache, N=N: full.step(token, cache, N)}, seconds / len(lengths))
        sizes = {'long-short': state.num_bytes, 'full': 2 * N * 512 * 4}
        rows += [dict(
            part='decoding', tokens=N, contender=name, seconds=statistics.median(values), rounds=len(values),
            to_long_short=ratio(values, times['long-short']), saved=sizes[name]) for name, values in times.items()]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        'Bidirectional: 64 channels, 2 heads, w 8, r 32, batch 4. Causal and decoding: 512 channels, 8 heads, w 512, '
        'c 16, r 1, batch 1. Times are medians of a step, or of one token; ratios medians over rounds (quartiles in '
        'brackets). Bytes are those kept for the backward pass, or between tokens.', '',
        '| part | tokens | contender | ms | times long-short | MB | rounds |', '|---|---|---|---|---|---|---|']
    lines += [
        f'| {row["part"]} | {row["tokens"]} | {row["contender"]} | {row["seconds"] * 1e3:.2f} | '
        f'{spread(row["to_long_short"])} | {row["saved"] / 1e6:.1f} | {row["rounds"]} |' for row in rows]
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
