#!/usr/bin/env python3
"""One image over several ranks: exactness, peak memory of a rank, bytes sent, time; and on paper for larger images.

    python benchmarks/spatial_parallel.py                        # vil_ls_small_linear at 1792 x 1024, 1 to 4 ranks
    python benchmarks/spatial_parallel.py --height 448 --width 448 --ranks 1 2 --model vil_ls_tiny_linear

Each number of ranks is a training step (forward and backward, float32) of fresh gloo processes. Peak memory is what a
process held at its peak less what it held before the model was made. Bytes are counted where they are sent, and stand
beside those of ring attention, which sends all keys and values of a strip to every other rank. Results go to
benchmarks/results/, with a plot.
"""
import argparse
import datetime
import functools
import json
import os
import platform
import resource
import socket
import tempfile
import time
from collections.abc import Callable
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
LINKS = (1e11, 1.25e10)

Layers = list[tuple[LongShortAttention2d, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vil_ls_small_linear')
    parser.add_argument('--height', type=int, default=1792)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 3, 4])
    parser.add_argument('--out', type=Path, help='default: benchmarks/results/spatial_parallel_cpu_float32_DATE')
    args = parser.parse_args()
    args.out = args.out or RESULTS / f'spatial_parallel_cpu_float32_{datetime.date.today()}'
    rows = [measure(args, ranks) for ranks in args.ranks]
    layers = layers_of(args.model)
    results = dict(
        model=args.model, image=[args.height, args.width], machine=platform.processor() or platform.machine(),
        cores=os.cpu_count(), torch=torch.__version__, rows=rows, ratios=ratios(layers), paper=paper(layers))
    args.out.with_suffix('.json').write_text(json.dumps(results, indent=1) + '\n')
    args.out.with_suffix('.md').write_text(page(results))
    draw(results, args.out.with_suffix('.png'))
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
        seconds=max(r['seconds'] for r in results), waiting=[r['waiting'] for r in results],
        logits=results[0]['logits'], norm=results[0]['norm'],
        ring=ring_bytes(layers_of(args.model), args.height, args.width, ranks))


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
    waiting = time_link(link)
    start = time.perf_counter()
    logits = model(strip)
    sent_forward = dict(link.sent)
    logits.square().sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    norm = sum(p.grad.double().square().sum() for p in model.parameters()) ** .5
    Path(folder, f'{rank}.json').write_text(json.dumps(dict(
        rows=rows[rank], peak_mb=peak / 1024, sent=dict(link.sent), sent_forward=sent_forward,
        seconds=seconds, waiting=sum(waiting), logits=logits[0].tolist(), norm=float(norm))))
    dist.destroy_process_group()


def time_link(link: Any) -> list[float]:
    """Makes a link note the seconds of each of its calls."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds.append(time.perf_counter() - start)
        return call

    for name in ('gather', 'sum', 'post', 'wait'):
        setattr(link, name, timed(getattr(link, name)))
    return seconds


def layers_of(model: str) -> Layers:
    """Attention layers of a model with their strides."""
    built, stride, out = timm.create_model(model), 1, []
    for stage in built.stages:
        stride *= stage.patch_embed.stride
        out += [(m, stride) for m in stage.modules() if isinstance(m, LongShortAttention2d)]
    return out


def ring_bytes(layers: Layers, height: int, width: int, ranks: int) -> float:
    """What a rank sends in a forward pass of full attention in a ring, float32.

    2 N C numbers of keys and values a layer over P strips, passed on P - 1 times. A backward pass sends twice as much:
    keys and values once more, and their gradients.
    """
    numbers = sum(2 * (height // stride) * (width // stride) * layer.dim for layer, stride in layers)
    return 4. * numbers / ranks * (ranks - 1)


def strip_bytes(layers: Layers, width: int, ranks: int) -> dict[str, float]:
    """What the rank that sends most sends in a forward pass, by the specification's formulas, float32.

    The window halo is 2 p W C numbers for each of one or two neighbours, p = max(w // 2, 1). A backward pass sends as
    much.
    """
    out = dict.fromkeys(('window halo', 'summaries', 'global tokens', 'head'), 0.)
    if ranks > 1:
        for m, stride in layers:
            h, r, g, C, p = m.num_heads, m.rank, m.num_global_tokens, m.dim, max(m.window_size // 2, 1)
            out['window halo'] += 4. * min(ranks - 1, 2) * 2 * p * (width // stride) * C
            out['summaries'] += 4. * (2 * h * r + 2 * r * C)
            out['global tokens'] += 4. * (2 * g * h + g * C)
        out['head'] = 4. * layers[-1][0].dim
    return out


def ratios(layers: Layers) -> list[dict[str, Any]]:
    """Bytes of strips and of a ring for square images, float32, by the formulas."""
    out = []
    for side in (1024, 2048, 4096, 8192, 16384):
        for ranks in (2, 4):
            strips, ring = strip_bytes(layers, side, ranks), ring_bytes(layers, side, side, ranks)
            total = sum(strips.values())
            out.append(dict(side=side, ranks=ranks, strips=strips, ring=ring, forward=ring / total,
                            step=3 * ring / (2 * total)))
    return out


def paper(layers: Layers) -> list[dict[str, Any]]:
    """A training step for square images of 10^6 to 10^9 pixels, bfloat16: seconds at the stated speeds."""
    # multiply-adds a pixel: linear maps (12 C^2 a token) and attention to window and summaries
    macs = sum((12 * m.dim ** 2 + 2 * m.dim * ((2 * m.window_size) ** 2 + m.rank)) / s ** 2 for m, s in layers)
    out = []
    for exponent in range(6, 10):
        side = round(10 ** (exponent / 2) / 32) * 32
        for devices in (1, 2, 4, 8, 16, 32, 64):
            if devices <= -(-side // 224):
                strips = 2 * sum(strip_bytes(layers, side, devices).values()) / 2  # there and back, two bytes a number
                out.append(dict(
                    pixels=10 ** exponent, devices=devices, tokens=side ** 2 // 16 // devices,
                    arithmetic_s=3 * 2 * macs * side ** 2 / devices / FLOPS,
                    strips_bytes=strips, ring_bytes=3 * ring_bytes(layers, side, side, devices) / 2))
    return out


def forward_backward(sent: dict[str, int]) -> int:
    """Bytes of the layers, without checks and parameters' gradients."""
    return sum(n for key, n in sent.items() if key not in ('checks', 'gradients'))


def page(results: dict[str, Any]) -> str:
    height, width = results['image']
    lines = [
        f'# Spatial parallelism: {results["model"]}, {height} x {width}, a training step, CPU, float32', '',
        f'torch {results["torch"]}, gloo on one machine of {results["cores"]} cores, one thread a rank, '
        'benchmarks/spatial_parallel.py. Bytes are of the rank that sends most. Ring attention sends keys and values '
        'of all strips forward, and these and their gradients backward. Communication is the time that the slowest '
        'rank spends in sending, receiving and waiting for others; more ranks than cores wait for each other.', '',
        '| ranks | rows | peak MB of a rank | of one rank | seconds | in communication | MB sent forward | backward | '
        'ring, MB forward | times fewer forward | times fewer in a step | gradients of weights, MB | '
        'logits differ by | gradient norm differs by |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|---|---|',
        *(measured_row(row, results['rows'][0]) for row in results['rows']),
        '', 'By the formulas, square images, float32:', '',
        '| image | ranks | window halo, MB | summaries, MB | ring, MB forward | times fewer forward | in a step |',
        '|---|---|---|---|---|---|---|']
    lines += [
        f'| {row["side"]} x {row["side"]} | {row["ranks"]} | {row["strips"]["window halo"] / MB:.2f} | '
        f'{row["strips"]["summaries"] / MB:.2f} | {row["ring"] / MB:,.0f} | {row["forward"]:.0f} | {row["step"]:.0f} |'
        for row in results['ratios']]
    fast, slow = (f'{speed:.3g} B/s' for speed in LINKS)
    lines += [
        '', f'On paper, a training step in bfloat16 at {FLOPS:.0e} operations a second and device, over links of '
        f'{fast} (within a host) and {slow} (100 Gbit/s between hosts), square images, from the formulas, without the '
        'gradients of weights:', '',
        f'| pixels | devices | tokens a device | arithmetic, s | strips, MB | s at {fast} | s at {slow} | '
        f'ring, MB | s at {fast} | s at {slow} |',
        '|---|---|---|---|---|---|---|---|---|---|']
    for row in results['paper']:
        cells = [f'{row["pixels"]:.0e}', row['devices'], f'{row["tokens"]:,}', f'{row["arithmetic_s"]:.2g}']
        for name in ('strips_bytes', 'ring_bytes'):
            cells += [f'{row[name] / MB:,.1f}', *(f'{row[name] / speed:.2g}' for speed in LINKS)]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines) + '\n'


def measured_row(row: dict[str, Any], first: dict[str, Any]) -> str:
    peak, scale = max(row['peak_mb']), max(abs(a) for a in first['logits'])
    off = max(abs(a - b) for a, b in zip(row['logits'], first['logits'])) / scale
    forward = forward_backward(row['sent_forward'])
    backward = forward_backward(row['sent']) - forward
    return (
        f'| {row["ranks"]} | {row["rows"]} | {peak:,.0f} | {peak / max(first["peak_mb"]):.2f} | '
        f'{row["seconds"]:.1f} | {max(row["waiting"]):.1f} | {forward / MB:.2f} | {backward / MB:.2f} | '
        f'{row["ring"] / MB:,.1f} | {row["ring"] / max(forward, 1):.0f} | '
        f'{3 * row["ring"] / max(forward + backward, 1):.0f} | {row["sent"].get("gradients", 0) / MB:.1f} | '
        f'{off:.1e} | {abs(row["norm"] / first["norm"] - 1):.1e} |')


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds of communication and of arithmetic over the devices, one plot for each size of image."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise SystemExit('the plot needs matplotlib: pip install matplotlib') from e
    sizes = sorted({row['pixels'] for row in results['paper'] if row['devices'] > 1})
    figure = Figure(figsize=(4 * len(sizes), 4), layout='constrained')
    for axes, pixels in zip(figure.subplots(1, len(sizes), sharey=True), sizes):
        rows = [row for row in results['paper'] if row['pixels'] == pixels and row['devices'] > 1]
        devices = [row['devices'] for row in rows]
        axes.plot(devices, [row['arithmetic_s'] for row in rows], 'o-', color='#222222', label='arithmetic')
        for name, key, color in (('strips', 'strips_bytes', '#2b6cb0'), ('ring attention', 'ring_bytes', '#dd7621')):
            for speed, line in zip(LINKS, ('o-', 'o--')):
                axes.plot(devices, [row[key] / speed for row in rows], line, color=color,
                          label=f'{name}, {speed / 1e9:g} GB/s')
        axes.set(xscale='log', yscale='log', xlabel='devices', title=f'$10^{{{len(str(pixels)) - 1}}}$ pixels')
        axes.set_xticks(devices, [str(n) for n in devices])
        axes.minorticks_off()
        axes.grid(alpha=.3)
    figure.axes[0].set_ylabel('seconds of a training step (on paper)')
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    main()
