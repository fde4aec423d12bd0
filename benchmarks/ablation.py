#!/usr/bin/env python3
"""Ablation of long-short attention on real images: CIFAR-10 at matched parameters and steps.

    python -m ls_vision.data.cifar10 --data-dir data/cifar10
    python benchmarks/ablation.py                   # every variant and seed; can be interrupted and resumed
    python benchmarks/ablation.py --report          # table and plots of the finished runs

Variants of one small ViL-LS: long-short; window only; long-range only (no window); without DualLN; full attention; and
a fixed projection (as in Linformer: learned, but the same for every image) instead of the dynamic one. The MLPs are
wider where a variant lacks parameters. Each run writes a file in --runs, so a finished run is not repeated. The report
in --out has means over seeds with their standard deviation.
"""
import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # idle threads sleep, because the machine may be shared

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from ls_vision.analysis.measure import describe_machine, write
from ls_vision.models import LongShortViL
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import write_text
from ls_vision.runtime.logs import ProgressBar, say

GRID, DEPTH, DIM, HEADS, WINDOW, RANK = 8, 4, 32, 2, 2, 8
MODEL: dict[str, Any] = dict(
    img_size=32, patch_size=32 // GRID, in_chans=5, num_classes=10, embed_dims=(DIM,), depths=(DEPTH,),
    num_heads=(HEADS,), attn_types='long-short', window_size=WINDOW, rank=RANK, num_global_tokens=0, rel_pos_bias=None,
)
VARIANTS: dict[str, dict[str, Any]] = {
    'long-short': {},
    'window only': dict(rank=0),
    'long-range only': dict(window_size=0),
    'without DualLN': dict(dual_ln=False),
    'full attention': dict(attn_types='full'),
    'fixed projection': {},
}
SHIFTS = {  # pixels to the right and down, scale of the content
    'as it is': (0, 0, 1.), 'shifted by 3': (3, 3, 1.), 'shifted by 6': (6, 6, 1.),
    'scaled by 0.75': (0, 0, .75), 'scaled by 1.25': (0, 0, 1.25),
}
MEAN, STD = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2470, .2435, .2616])


class FixedProjection(nn.Module):
    """Linformer's projection instead of the dynamic one: (h, r, N) learned scores, the same for every image."""

    def __init__(self, num_heads: int, rank: int, num_tokens: int):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(num_heads, rank, num_tokens))

    def forward(self, x: Tensor) -> Tensor:
        """(B, g + N, C) -> (B, g + N, h * r), scores of which those of the g global tokens are not used."""
        scores = self.scores.flatten(0, 1).t()  # (N, h * r)
        scores = F.pad(scores, (0, 0, x.shape[1] - scores.shape[0], 0))
        return scores.to(x.dtype).expand(x.shape[0], -1, -1)


def build(variant: str, mlp_ratio: float = 4.) -> nn.Module:
    model = LongShortViL(**{**MODEL, **VARIANTS[variant]}, mlp_ratio=mlp_ratio)
    if variant == 'fixed projection':
        for block in model.stages[0].blocks:  # type: ignore[union-attr, index]
            block.attn.to_dynamic_projection = FixedProjection(HEADS, RANK, GRID * GRID)
    return model


def matched_mlp_ratio(variant: str) -> float:
    """The MLP width at which a variant has as many parameters as long-short attention."""
    target = count(build('long-short'))
    return min(((4 * DIM + extra) / DIM for extra in range(-24, 49)),
               key=lambda ratio: abs(count(build(variant, ratio)) - target))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def load_split(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a split, (N, 3, 32, 32) bytes, and their classes."""
    if not folder.is_dir():
        raise UserError(f'{folder} does not exist: python -m ls_vision.data.cifar10 --data-dir {folder.parent}')
    dataset = ImageFolder(str(folder))
    pixels = np.empty((len(dataset), 32, 32, 3), dtype=np.uint8)
    with ProgressBar(f'reading {folder}', len(dataset)) as progress:
        for i in range(len(dataset)):
            pixels[i] = dataset[i][0]
            progress.update()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def prepare(pixels: Tensor, shift: tuple[int, int, float] = (0, 0, 1.)) -> Tensor:
    """Bytes (B, 3, 32, 32) to normalised images, their content moved, with two channels of coordinates: (B, 5, 32, 32).

    Only windows and full attention support a position bias; with coordinates every variant knows positions equally.
    """
    images = move((pixels.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), *shift)
    line = torch.linspace(-1, 1, 32)
    coordinates = torch.stack(torch.meshgrid(line, line, indexing='ij')).expand(len(images), -1, -1, -1)
    return torch.cat([images, coordinates], dim=1)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels and flip half of them."""
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode='reflect').to(pixels.dtype)
    rows, columns = torch.randint(0, 9, (2, len(pixels)), generator=generator)
    flips = torch.rand(len(pixels), generator=generator) < .5
    crops = [image[:, r:r + 32, c:c + 32] for image, r, c in zip(padded, rows.tolist(), columns.tolist(), strict=True)]
    return torch.where(flips.view(-1, 1, 1, 1), torch.stack(crops).flip(-1), torch.stack(crops))


def train(model: nn.Module, data: dict[str, Any], args: argparse.Namespace, seed: int, title: str) -> list[Any]:
    """The same images in the same order for every variant of a seed; returns (step, top-1 on 2,000 images) pairs."""
    images, targets = data['train']
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=args.lr, weight_decay=.05)
    schedule = CosineLRScheduler(
        optimizer, args.steps, warmup_t=args.steps // 10, warmup_lr_init=1e-5, warmup_prefix=True, t_in_epochs=False)
    order = torch.empty(0, dtype=torch.long)
    curve = []
    with ProgressBar(title, args.steps, log_interval=200) as progress:
        for step in range(1, args.steps + 1):
            schedule.step_update(step - 1)
            if len(order) < args.batch_size:
                order = torch.randperm(len(images), generator=generator)
            batch, order = order[:args.batch_size], order[args.batch_size:]
            loss = F.cross_entropy(model.train()(prepare(augment(images[batch], generator))), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            if step % (args.steps // 8) == 0:
                curve.append((step, accuracy(model, data['val'][0][::5], data['val'][1][::5])))
            progress.update(loss=loss.item())
    return curve


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor, shift: tuple[int, int, float] = (0, 0, 1.)) -> float:
    """Top-1 in percent on images whose content was shifted and scaled."""
    model.eval()
    right = sum(
        int((model(prepare(some, shift)).argmax(-1) == labels).sum())
        for some, labels in zip(images.split(500), targets.split(500), strict=True))
    return 100 * right / len(images)


def move(images: Tensor, right: int, down: int, scale: float) -> Tensor:
    """Shift by pixels and scale about the centre; pixels from outside repeat the border."""
    if (right, down, scale) == (0, 0, 1.):
        return images
    theta = torch.tensor([[1 / scale, 0, -right / 16], [0, 1 / scale, -down / 16]])
    grid = F.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode='border', align_corners=False)


@torch.inference_mode()
def similarity_per_layer(model: nn.Module, images: Tensor) -> list[float]:
    """Mean cosine similarity of two different tokens of an image, after each block: 1 where all tokens are one."""
    found: list[float] = []

    def record(module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        unit = F.normalize(tokens, dim=-1)
        cosines = unit @ unit.transpose(1, 2)
        found.append(float((cosines.sum((1, 2)) / tokens.shape[1] - 1).mean() / (tokens.shape[1] - 1)))

    hooks = [block.register_forward_hook(record) for block in model.stages[0].blocks]  # type: ignore[union-attr, index]
    model.eval()(prepare(images))
    for hook in hooks:
        hook.remove()
    return found


def train_and_measure(variant: str, seed: int, data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant from one seed and measure it."""
    torch.manual_seed(seed)
    model = build(variant, matched_mlp_ratio(variant))
    start = time.perf_counter()
    curve = train(model, data, args, seed, f'{variant}, seed {seed}')
    images, targets = data['val']
    return dict(
        variant=variant, seed=seed, steps=args.steps, batch_size=args.batch_size, lr=args.lr, parameters=count(model),
        seconds=time.perf_counter() - start, curve=curve, similarity=similarity_per_layer(model, images[::20]),
        shifted={name: accuracy(model, images, targets, shift) for name, shift in SHIFTS.items()},
    )


def train_all(args: argparse.Namespace) -> None:
    """Every run without a file; seeds are the outer loop, so that an early stop leaves complete comparisons."""
    missing = [(seed, variant) for seed in args.seeds for variant in args.variants
               if not run_path(args.runs, variant, seed).exists()]
    if not missing:
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    data = {split: load_split(Path(args.data_dir) / split) for split in ('train', 'val')}
    for seed, variant in missing:
        result = train_and_measure(variant, seed, data, args)
        path = run_path(args.runs, variant, seed)
        write_text(path, json.dumps(result))
        say(f'{variant}, seed {seed}: top-1 {result["shifted"]["as it is"]:.2f} % after {result["seconds"]:.0f} s')


def run_path(runs: Path, variant: str, seed: int) -> Path:
    return runs / f'{variant.replace(" ", "-")}_{seed}.json'


def write_report(args: argparse.Namespace) -> None:
    """Table and plots of the finished runs, dated."""
    paths = [run_path(args.runs, variant, seed) for variant in args.variants for seed in args.seeds]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not results:
        raise UserError(f'{args.runs} holds no finished run')
    settings = {(r['steps'], r['batch_size'], r['lr']) for r in results}
    if len(settings) > 1:
        raise UserError(f'{args.runs} holds runs of different steps, batch sizes or learning rates: {sorted(settings)}')
    by_variant = {v: [r for r in results if r['variant'] == v] for v in args.variants}
    by_variant = {variant: runs for variant, runs in by_variant.items() if runs}
    path = args.out / f'ablation_cifar10_{datetime.date.today():%Y-%m-%d}'
    machine = describe_machine('cpu', 'float32', torch.get_num_threads())
    write(path, machine, results, markdown(by_variant, next(iter(settings)), path.name))
    draw(by_variant, path)
    say(f'{path}.md: {len(results)} runs')


def markdown(by_variant: dict[str, list[dict[str, Any]]], settings: tuple[int, int, float], name: str) -> str:
    steps, batch_size, lr = settings
    lines = [
        f'{steps} updates of {batch_size} images, AdamW at {lr:g}, cosine; {DEPTH} blocks of width {DIM} on a grid of '
        f'{GRID} x {GRID}, window {WINDOW}, rank {RANK}. Top-1 in percent on the 10,000 test images: mean over seeds, '
        'standard deviation after it. Shifts in pixels of 32, right and down. Similarity: mean cosine between two '
        'tokens of an image after the last block.', '',
        '| variant | seeds | parameters | ' + ' | '.join(SHIFTS) + ' | similarity |',
        '|---|---|---|' + '---|' * (len(SHIFTS) + 1)]
    for variant, runs in by_variant.items():
        cells = [spread([r['shifted'][shift] for r in runs]) for shift in SHIFTS]
        similarity = spread([r['similarity'][-1] for r in runs], digits=3)
        lines.append(f'| {variant} | {len(runs)} | {runs[0]["parameters"]:,} | {" | ".join(cells)} | {similarity} |')
    plots = f'![learning curves]({name}_curves.png)', '', f'![similarity]({name}_similarity.png)'
    return '\n'.join([*lines, '', *plots])


def spread(values: list[float], digits: int = 2) -> str:
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{deviation}'


def draw(by_variant: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Learning curves and similarity per layer, means over seeds with the range as a band."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError('the plots need matplotlib: pip install matplotlib') from e
    for name, x_label, y_label in (
            ('curves', 'update', 'top-1 on 2,000 test images (%)'),
            ('similarity', 'block', 'mean cosine of two tokens')):
        figure = Figure(figsize=(7, 4.5), layout='constrained')
        axes = figure.subplots()
        for variant, runs in by_variant.items():
            if name == 'curves':
                x, y = [step for step, _ in runs[0]['curve']], [[top1 for _, top1 in r['curve']] for r in runs]
            else:
                x, y = list(range(1, DEPTH + 1)), [r['similarity'] for r in runs]
            line, = axes.plot(x, np.mean(y, axis=0), label=variant)
            axes.fill_between(x, np.min(y, axis=0), np.max(y, axis=0), color=line.get_color(), alpha=.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=.3)
        axes.legend()
        figure.savefig(f'{path}_{name}.png', dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', default='data/cifar10', metavar='DIR', help='CIFAR-10 as an image folder')
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS, help='what to train')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='a run of each variant for each')
    parser.add_argument('--steps', type=int, default=500, help='updates of a run')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--lr', type=float, default=2e-3, help='peak learning rate')
    parser.add_argument('--runs', type=Path, default=Path('output/ablation'), help='folder of finished runs')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder of table and plots')
    parser.add_argument('--report', action='store_true', help='train nothing')
    args = parser.parse_args(argv)
    try:
        if not args.report:
            train_all(args)
        write_report(args)
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(f'\nInterrupted; finished runs are in {args.runs}')


if __name__ == '__main__':
    main()
