#!/usr/bin/env python3
"""A byte model of six novels: long-short attention, the window alone, and full attention at equal updates.

    python -m ls_vision.data.austen --data-dir data/austen
    python benchmarks/characters.py                    # every variant and seed; can be interrupted and resumed
    python benchmarks/characters.py --variants long-short --seeds 0 --steps 500
    python benchmarks/characters.py --report           # table of the finished runs

The first 90 % of the bytes are for training, the next 5 % for validation, the last 5 % for testing. Validation streams:
the text goes in segment by segment with memory. `bits` are bits per byte; `by memory` those of segments that begin with
so many tokens of memory, the paper's point. Time and memory of decoding: benchmarks/sequence_attention.py.
"""
import argparse
import functools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sequence_contenders import FullAttention1d
from torch import Tensor, nn
from training_runs import add_arguments, publish, run_all, spread, train

from ls_vision.data.austen import read_bytes
from ls_vision.models.language_model import LanguageModel
from ls_vision.runtime.arguments import positive_int, positive_number

MODEL: dict[str, Any] = dict(dim=128, depth=4, num_heads=4, hidden_dim=512, window_size=64, chunk_size=16)
VARIANTS: dict[str, dict[str, Any]] = {'long-short': {}, 'window only': dict(chunk_rank=0), 'full': {}}


class FullCausalAttention(FullAttention1d):
    """Full causal attention with rotary positions, called as a causal layer without a state."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of (B, h, N, d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] / 10000 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def build(variant: str) -> LanguageModel:
    attentions: list[nn.Module] | None = None
    if variant == 'full':
        attentions = [FullCausalAttention(MODEL['dim'], MODEL['num_heads']) for _ in range(MODEL['depth'])]
    return LanguageModel(256, **{**MODEL, **VARIANTS[variant]}, attentions=attentions)


@torch.no_grad()
def bits_of(model: LanguageModel, text: Tensor, memory: int, segment: int, streams: bool) -> float:
    """Bits per byte of a text (n,), each byte but those before the first segment after `memory` bytes or more.

    With a state the text streams in pieces of `segment` bytes; memory is then cut every `memory + segment` bytes.
    """
    total, count = 0., 0
    for start in range(0, len(text) - memory - segment - 1, segment):
        part = text[start:start + memory + segment + 1][None]
        if streams:
            logits, states = [], None
            for piece in part[:, :-1].split(segment, dim=1):
                out, states = model(piece, states=states)
                logits.append(out)
            predicted = torch.cat(logits, dim=1)[0, memory:]
        else:
            predicted = model(part[:, :-1])[0, memory:]
        total += F.cross_entropy(predicted.float(), part[0, memory + 1:], reduction='sum').item()
        count += len(predicted)
    return total / max(count, 1) / math.log(2)


@functools.cache
def read_text(data_dir: str) -> Tensor:
    """(n,) bytes of the novels."""
    return torch.frombuffer(bytearray(read_bytes(data_dir)), dtype=torch.uint8).long()


def run_variant(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    data = read_text(args.data_dir)
    torch.manual_seed(seed)
    model = build(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / args.warmup, 1.))
    cut, end = len(data) * 90 // 100, len(data) * 95 // 100
    training, validation, test = data[:cut], data[cut:end], data[end:]

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 10 ** 6 + step)
        starts = torch.randint(len(training) - args.segment - 1, (args.batch,), generator=generator)
        batch = torch.stack([training[s:s + args.segment + 1] for s in starts])
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def evaluate() -> dict[str, Any]:
        streams = variant != 'full'
        texts = [text[:args.evaluate] for text in (validation, test)]
        bits = [bits_of(model, text, args.segment, args.segment, streams) for text in texts]
        by_memory = {
            str(memory): bits_of(model, texts[0], memory, args.segment // 2, streams) for memory in args.memory}
        return dict(variant=variant, seed=seed, validation=bits[0], test=bits[1], by_memory=by_memory)

    return train(path_of(args, variant, seed), model, optimizer, scheduler, loss_of, evaluate, args.steps)


def path_of(args: argparse.Namespace, variant: str, seed: int) -> Path:
    return args.runs / f'{variant.replace(" ", "_")}_{args.steps}_{seed}'


def markdown(rows: list[dict[str, Any]]) -> str:
    memories = list(rows[0]['by_memory']) if rows else []
    lines = [
        'Bits per byte, means over seeds with standard deviations; last, of validation by bytes of memory before a '
        'segment.', '',
        f'| variant | seeds | validation | test | seconds | {" | ".join(memories)} |',
        '|---' * (5 + len(memories)) + '|']
    for variant in VARIANTS:
        runs = [row for row in rows if row['variant'] == variant]
        if runs:
            cells = [spread([row[key] for row in runs], 3) for key in ('validation', 'test')]
            cells.append(f'{statistics.mean(row["seconds"] for row in runs):.0f}')
            cells += [f'{statistics.mean(row["by_memory"][m] for row in runs):.3f}' for m in memories]
            lines.append(f'| {variant} | {len(runs)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, VARIANTS, 'output/characters', steps=3000)
    parser.add_argument('--data-dir', default='data/austen')
    parser.add_argument('--batch', type=positive_int, default=8)
    parser.add_argument('--segment', type=positive_int, default=512, help='bytes')
    parser.add_argument('--lr', type=positive_number, default=1e-3)
    parser.add_argument('--warmup', type=positive_int, default=200, help='updates')
    parser.add_argument('--memory', nargs='+', type=int, default=[0, 64, 256, 1024, 4096])
    parser.add_argument('--evaluate', type=positive_int, default=50_000, help='bytes of validation and of test text')
    args = parser.parse_args()
    rows = run_all(args, functools.partial(path_of, args), functools.partial(run_variant, args))
    publish(args, 'characters', rows, markdown(rows))


if __name__ == '__main__':
    main()
