#!/usr/bin/env python3
"""One image over several ranks: exactness, peak memory of a rank, bytes sent, time; and on paper for larger images.

    python benchmarks/spatial_parallel.py                        # vil_ls_small_linear at 1792 x 1024, 1, 2 and 4 ranks
    python benchmarks/spatial_parallel.py --height 448 --width 448 --ranks 1 2 --model vil_ls_tiny_linear

Each number of ranks is a training step (forward and backward, float32) of fresh gloo processes. Peak memory is what a
process held at its peak less what it held before the model was made. Bytes are counted where they are sent, and stand
beside those of ring attention, which sends all keys and values of a strip to every other rank. Results go to
benchmarks/results/.
"""
import argparse
import datetime
import json
import platform
import resource
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import ls_vision  # noqa: F401  registers the models
from ls_vision.layers import LongShortAttention2d
from ls_vision.parallel import parallelize, row_multiple
from ls_vision.parallel.strips import strip_rows

RESULTS = Path(__file__).parent / 'results'
MB = 2 ** 20
# Stated, not measured: what a device sustains on these models in bfloat16, and what a link of it carries.
FLOPS = 2e14
LINK = 1e11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vil_ls_small_linear')
    parser.add_argument('--height', type=int, default=1792)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 4])
    parser.add_argument('--out', type=Path, help='default: benchmarks/results/spatial_parallel_cpu_float32_DATE')
    args = parser.parse_args()
    args.out = args.out or RESULTS / f'spatial_parallel_cpu_float32_{datetime.date.today()}'
    rows = [measure(args, ranks) for ranks in args.ranks]
    results = dict(
        model=args.model, image=[args.height, args.width], machine=platform.processor() or platform.machine(),
        torch=torch.__version__, rows=rows, paper=paper(args.model))
    args.out.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
    args.out.with_suffix('.md').write_text(page(results))
    print(page(results))


def measure(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """One step on so many ranks."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        s.close()
        mp.spawn(step, (ranks, port, folder, args), nprocs=ranks)
        results = [json.loads(Path(folder, f'{rank}.json').read_text()) for rank in range(ranks)]
    busiest = max(results, key=lambda r: forward_backward(r['sent']))
    return dict(
        ranks=ranks, rows=[r['rows'] for r in results], peak_mb=[r['peak_mb'] for r in results],
        sent=busiest['sent'], sent_forward=busiest['sent_forward'],
        seconds=max(r['seconds'] for r in results), logits=results[0]['logits'], norm=results[0]['norm'],
        ring=ring_bytes(args.model, args.height, args.width, ranks))


def step(rank: int, ranks: int, port: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=ranks)
    mesh = init_device_mesh('cpu', (ranks,), mesh_dim_names=('space',))['space']
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    model = parallelize(timm.create_model(args.model, num_classes=10), mesh, timeout=1800.)
    rows = strip_rows(args.height, ranks, row_multiple(model))
    generator = torch.Generator().manual_seed(1)
    strip = torch.randn(3, args.height, args.width, generator=generator)[:, sum(rows[:rank]):][:, :rows[rank]]
    strip = strip[None].clone()
    link = model.stages[0].patch_embed.strips.link
    start = time.perf_counter()
    logits = model(strip)
    sent_forward = dict(link.sent)
    logits.square().sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    norm = sum(p.grad.double().square().sum() for p in model.parameters()) ** .5
    Path(folder, f'{rank}.json').write_text(json.dumps(dict(
        rows=rows[rank], peak_mb=peak / 1024, sent=dict(link.sent), sent_forward=sent_forward,
        seconds=seconds, logits=logits[0].tolist(), norm=float(norm))))
    dist.destroy_process_group()


def layers_of(model: str) -> list[tuple[LongShortAttention2d, int]]:
    """Attention layers of a model with their strides."""
    built, stride, out = timm.create_model(model), 1, []
    for stage in built.stages:
        stride *= stage.patch_embed.stride
        out += [(m, stride) for m in stage.modules() if isinstance(m, LongShortAttention2d)]
    return out


def ring_bytes(model: str, height: int, width: int, ranks: int) -> float:
    """What a rank sends for keys and values of a forward pass of full attention in a ring, float32."""
    tokens = [(height // stride) * (width // stride) * layer.dim for layer, stride in layers_of(model)]
    return 4. * 2 * sum(tokens) / ranks * (ranks - 1)


def strip_bytes(layers: list[tuple[LongShortAttention2d, int]], width: int) -> float:
    """What a rank between two others sends in a forward pass, by the formulas, float32."""
    total = 0.
    for m, stride in layers:
        h, r, g, C, p = m.num_heads, m.rank, m.num_global_tokens, m.dim, max(m.window_size // 2, 1)
        total += 2 * h * r + 2 * r * C + 2 * g * h + g * C + 2 * 2 * p * (width // stride) * C
    return 4. * total


def paper(model: str) -> list[dict[str, Any]]:
    """Square images of 10^6 to 10^9 pixels, bfloat16: seconds of a forward pass at the stated speeds."""
    layers = layers_of(model)
    # multiply-adds a pixel: linear maps (12 C^2 a token) and attention to window and summaries
    macs = sum((12 * m.dim ** 2 + 2 * m.dim * ((2 * m.window_size) ** 2 + m.rank)) / s ** 2 for m, s in layers)
    out = []
    for exponent in range(6, 10):
        side = round(10 ** (exponent / 2) / 32) * 32
        for devices in (1, 8, 64):
            most = -(-side // 224)
            if devices <= most:
                sent = strip_bytes(layers, side) / 2 if devices > 1 else 0.
                out.append(dict(
                    pixels=10 ** exponent, devices=devices, tokens=side ** 2 // 16 // devices,
                    arithmetic_s=2 * macs * side ** 2 / devices / FLOPS, strips_s=sent / LINK,
                    ring_s=ring_bytes(model, side, side, devices) / 2 / LINK))
    return out


def forward_backward(sent: dict[str, int]) -> int:
    """Bytes of the layers, without checks and parameters' gradients."""
    return sum(n for key, n in sent.items() if key not in ('checks', 'gradients'))


def page(results: dict[str, Any]) -> str:
    first = results['rows'][0]
    height, width = results['image']
    lines = [
        f'# Spatial parallelism: {results["model"]}, {height} x {width}, a training step, CPU, float32', '',
        f'torch {results["torch"]}, gloo on one machine, one thread a rank, benchmarks/spatial_parallel.py. Bytes are '
        'of the rank that sends most; ring attention sends keys and values of the other strips.', '',
        '| ranks | rows | peak MB of a rank | of one rank | seconds | MB sent forward | ring, MB forward | '
        'times fewer | MB sent backward | gradients of weights, MB | logits differ by | gradient norm differs by |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|']
    for row in results['rows']:
        peak, norm = max(row['peak_mb']), row['norm']
        scale = max(abs(a) for a in first['logits'])
        off = max(abs(a - b) for a, b in zip(row['logits'], first['logits'])) / scale
        forward = forward_backward(row['sent_forward'])
        backward = forward_backward(row['sent']) - forward
        lines.append(
            f'| {row["ranks"]} | {row["rows"]} | {peak:,.0f} | {peak / max(first["peak_mb"]):.2f} | '
            f'{row["seconds"]:.1f} | {forward / MB:.2f} | {row["ring"] / MB:,.1f} | '
            f'{row["ring"] / max(forward, 1):.0f} | {backward / MB:.2f} | '
            f'{row["sent"].get("gradients", 0) / MB:.1f} | {off:.1e} | {abs(norm / first["norm"] - 1):.1e} |')
    lines += [
        '', f'On paper, a forward pass in bfloat16: {FLOPS:.0e} operations and {LINK:.0e} bytes a second and device, '
        'square images, from the counted formulas.', '',
        '| pixels | devices | tokens a device | arithmetic, s | strips, s | ring attention\'s keys and values, s |',
        '|---|---|---|---|---|---|']
    lines += [
        f'| {row["pixels"]:.0e} | {row["devices"]} | {row["tokens"]:,} | {row["arithmetic_s"]:.2g} | '
        f'{row["strips_s"]:.2g} | {row["ring_s"]:.2g} |' for row in results['paper']]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
