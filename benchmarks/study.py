#!/usr/bin/env python3
"""Do the summaries of long-short attention earn their keep, and how many, with which window? Two tasks, equal updates.

    python -m ls_vision.data.cifar10 --data-dir data/cifar10
    python benchmarks/study.py                      # every run; can be interrupted and resumed
    python benchmarks/study.py --tasks pairs --variants long-short "window only" --seeds 0 --steps 500
    python benchmarks/study.py --report             # tables and plots of the finished runs
    python benchmarks/study.py --report --publish   # writes the tables into docs/study.md too, between its markers

Tasks: CIFAR-10, and pairs of digits that no stack of windows can compare (`digit_pairs.py`). Variants: the parts of
the attention, the start of the projection, the rank r, and the window w; each differs from long-short attention in one
thing. MLPs are wider where a variant lacks parameters, and narrower where it has more. All variants of a seed see the
same images in the same order, and start from the same values where they have the same parameters. The report has
differences to long-short attention of the same seed with 95 % confidence intervals, learning curves, and accuracy by r
and by w.
"""
import argparse
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # idle threads sleep, because the machine may be shared

import digit_pairs
import numpy as np
import torch
import torch.nn.functional as F
from pages import replace_section
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm
from training_runs import CHECKPOINT_STEPS, add_arguments, dated, interval, publish, run_all, spread, train

from ls_vision.analysis.pictures import check_available
from ls_vision.analysis.record import record
from ls_vision.analysis.summaries import use_of_summaries
from ls_vision.models import LongShortViL
from ls_vision.runtime.arguments import positive_int, positive_number
from ls_vision.runtime.errors import UserError

DIM, HEADS, MLP_RATIO = 32, 2, 2.
MODEL: dict[str, Any] = dict(
    embed_dims=(DIM,), num_heads=HEADS, attn_types='long-short', window_size=2, rank=8, num_global_tokens=0,
    rel_pos_bias=None)
BASE = 'long-short'
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    'parts': {
        BASE: {},
        'window only': dict(rank=0),
        'long-range only': dict(window_size=0),
        'full attention': dict(attn_types='full'),
        'fixed projection': {},
        'without DualLN': dict(dual_ln=False),
    },
    'start': {'start std 1': dict(projection_init=1.), 'orthogonal start': dict(projection_init='orthogonal')},
    'rank': {f'rank {r}': dict(rank=r) for r in (1, 2, 4, 16)},
    'window': {f'window {w}': dict(window_size=w) for w in (4, 8)},
}
VARIANTS = {name: args for group in GROUPS.values() for name, args in group.items()}
BY_RANK = {0: 'window only', 1: 'rank 1', 2: 'rank 2', 4: 'rank 4', 8: BASE, 16: 'rank 16'}
BY_WINDOW = {0: 'long-range only', 2: BASE, 4: 'window 4', 8: 'window 8'}
PAGE = Path(__file__).parents[1] / 'docs/study.md'
TEST_PAIRS = 4000
RECORDED = 8  # test images whose summaries are looked at
MEAN, STD = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2470, .2435, .2616])


class Task(NamedTuple):
    """Images, and what is asked about them."""
    title: str
    model: dict[str, Any]
    feat_size: tuple[int, int]
    train: Callable[[argparse.Namespace, int], tuple[Tensor, Tensor]]
    """(arguments, seed of the batch) -> (B, channels, height, width) and targets."""
    test: Callable[[argparse.Namespace], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], dict[str, float]]
    """(scores, targets) of the test images -> measures; the first is the one compared."""


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------

@functools.cache
def read_cifar10(folder: str) -> tuple[Tensor, Tensor]:
    """All images of a split, (N, 3, 32, 32) bytes, and their classes."""
    if not Path(folder).is_dir():
        raise UserError(f'{folder} does not exist: python -m ls_vision.data.cifar10 --data-dir {Path(folder).parent}')
    dataset = ImageFolder(folder)
    pixels = np.empty((len(dataset), 32, 32, 3), dtype=np.uint8)
    for i in tqdm(range(len(dataset)), desc=f'reading {folder}', leave=False, disable=None):
        pixels[i] = dataset[i][0]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def cifar10_batch(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Images shifted by up to 4 pixels, half of them flipped."""
    images, targets = read_cifar10(f'{args.data_dir}/train')
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (args.batch,), generator=generator)
    rows, columns = torch.randint(0, 9, (2, args.batch), generator=generator)
    flips = torch.rand(args.batch, generator=generator) < .5
    padded = F.pad(images[chosen].float(), (4, 4, 4, 4), mode='reflect')
    crops = torch.stack([
        image[:, r:r + 32, c:c + 32] for image, r, c in zip(padded, rows.tolist(), columns.tolist(), strict=True)])
    return normalize(torch.where(flips.view(-1, 1, 1, 1), crops.flip(-1), crops)), targets[chosen]


def cifar10_test(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images, targets = read_cifar10(f'{args.data_dir}/val')
    return normalize(images.float()), targets


def normalize(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) of 0 to 255, to mean 0 and standard deviation 1."""
    return (pixels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def score_classes(scores: Tensor, targets: Tensor) -> dict[str, float]:
    return dict(accuracy=accuracy(scores, targets), cross_entropy=F.cross_entropy(scores, targets).item())


# ---- pairs of digits -------------------------------------------------------------------------------------------------

def pairs_batch(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    return digit_pairs.make_pairs(args.batch, seed)


def pairs_test(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    return digit_pairs.make_pairs(args.test_pairs, -1)


def pairs_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return sum((F.cross_entropy(s, t) for s, t in split_pairs(scores, targets)), scores.new_zeros(()))


def score_pairs(scores: Tensor, targets: Tensor) -> dict[str, float]:
    same, left, right = split_pairs(scores, targets)
    return dict(
        accuracy=accuracy(*same), cross_entropy=F.cross_entropy(*same).item(),
        digits=statistics.mean([accuracy(*left), accuracy(*right)]))


def split_pairs(scores: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Scores and targets of: the same?, left digit, right digit."""
    parts = scores.split([2, digit_pairs.DIGITS, digit_pairs.DIGITS], dim=1)
    return list(zip(parts, targets.unbind(1), strict=True))


TASKS = {
    'cifar10': Task(
        'CIFAR-10', dict(img_size=32, patch_size=4, in_chans=3 + 2, num_classes=10, depths=(3,)), (8, 8),
        cifar10_batch, cifar10_test, F.cross_entropy, score_classes),
    'pairs': Task(
        'pairs of digits', dict(
            img_size=(digit_pairs.HEIGHT, digit_pairs.WIDTH), patch_size=8, in_chans=1 + 2,
            num_classes=digit_pairs.CLASSES, depths=(2,)),
        (2, 36), pairs_batch, pairs_test, pairs_loss, score_pairs),
}


# ---- models ----------------------------------------------------------------------------------------------------------

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


def build(task: str, variant: str, mlp_ratio: float = MLP_RATIO) -> nn.Module:
    model = LongShortViL(**{**MODEL, **TASKS[task].model, **VARIANTS[variant]}, mlp_ratio=mlp_ratio)
    if variant == 'fixed projection':
        rows, columns = TASKS[task].feat_size
        for block in model.stages[0].blocks:  # type: ignore[union-attr, index]
            block.attn.to_dynamic_projection = FixedProjection(HEADS, MODEL['rank'], rows * columns)
    return model


@functools.cache
def matched_mlp_ratio(task: str, variant: str) -> float:
    """The MLP width at which a variant has as many parameters as long-short attention."""
    lacking = count(build(task, BASE)) - count(build(task, variant))
    depth, = TASKS[task].model['depths']
    return MLP_RATIO + round(lacking / (depth * (2 * DIM + 1))) / DIM  # a hidden unit has 2 * DIM + 1 parameters


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def start(task: str, variant: str, seed: int) -> nn.Module:
    """The model of a variant before training; where names and shapes are those of long-short attention, its values."""
    torch.manual_seed(seed)
    base = build(task, BASE).state_dict()
    ratio = matched_mlp_ratio(task, variant)
    torch.manual_seed(seed)
    model = build(task, variant, ratio)
    own = model.state_dict()
    # the projection stays: its start may be what the variant is about
    shared = {name: value for name, value in base.items()
              if name in own and own[name].shape == value.shape and 'to_dynamic_projection' not in name}
    model.load_state_dict({**own, **shared})
    return model


def with_coordinates(images: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, c + 2, H, W).

    Only windows and full attention support a position bias; with coordinates every variant knows positions equally.
    """
    lines = [torch.linspace(-1, 1, size) for size in images.shape[2:]]
    coordinates = torch.stack(torch.meshgrid(*lines, indexing='ij')).expand(len(images), -1, -1, -1)
    return torch.cat([images, coordinates], dim=1)


# ---- runs ------------------------------------------------------------------------------------------------------------

def run_case(args: argparse.Namespace, case: tuple[str, str], seed: int) -> dict[str, Any]:
    """Trains a variant on a task from one seed and measures it."""
    task = TASKS[case[0]]
    images, targets = task.test(args)
    model = start(*case, seed)
    before = summaries_of(model, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=.1)

    def loss_of(step: int) -> Tensor:
        some, answers = task.train(args, seed * 10 ** 6 + step)
        return task.loss(model(with_coordinates(some)), answers)

    @torch.inference_mode()
    def evaluate() -> dict[str, Any]:
        scores = torch.cat([model(with_coordinates(some)) for some in images.split(250)])
        return dict(
            task=case[0], variant=case[1], seed=seed, batch=args.batch, lr=args.lr, parameters=count(model),
            **task.score(scores, targets), start=before, end=summaries_of(model, images))

    return train(path_of(args, case, seed), model, optimizer, scheduler, loss_of, evaluate, args.steps)


def summaries_of(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Effective ranks of the summaries and the share of attention on them, means over images, blocks and heads."""
    some = with_coordinates(images[:RECORDED]).split(1)
    rows = [row for image in some for row in use_of_summaries(record(model, image))]
    return {name: statistics.mean(getattr(row, name) for row in rows) for name in ('maps_rank', 'keys_rank', 'share')}


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """In percent."""
    return 100 * (scores.argmax(-1) == targets).float().mean().item()


def path_of(args: argparse.Namespace, case: tuple[str, str], seed: int) -> Path:
    return folder_of(args) / f'{case[0]}_{case[1].replace(" ", "-")}_{seed}'


def folder_of(args: argparse.Namespace) -> Path:
    """Where the runs of these updates are kept: runs of others are never mixed with them."""
    test = '' if args.test_pairs == TEST_PAIRS else f'_{args.test_pairs}_test_pairs'
    return args.runs / f'{args.steps}x{args.batch}_{args.lr:g}{test}'


def run_study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Group by group, seeds outside, so that a stop leaves complete comparisons."""
    rows = []
    for group in GROUPS.values():
        cases = [(task, variant) for task in args.tasks for variant in group if variant in args.variants]
        rows += run_all(args, functools.partial(path_of, args), functools.partial(run_case, args), cases)
    if not rows:
        raise UserError(f'{folder_of(args)} holds no finished run')
    return rows


# ---- report ----------------------------------------------------------------------------------------------------------

def differences(rows: list[dict[str, Any]], variant: str) -> list[float]:
    """Accuracy minus that of long-short attention of the same seed, of one task's rows."""
    base = {row['seed']: row['accuracy'] for row in rows if row['variant'] == BASE}
    return [row['accuracy'] - base[row['seed']]
            for row in rows if row['variant'] == variant and row['seed'] in base]


def markdown(rows: list[dict[str, Any]], name: str) -> str:
    """What the results file says: settings, tables, pictures."""
    first = rows[0]
    settings = (
        f'{first["steps"]} updates of {first["batch"]} images, AdamW at {first["lr"]:g}, one cycle; width {DIM}, '
        f'{HEADS} heads, window {MODEL["window_size"]} and rank {MODEL["rank"]} where the variant does not say '
        'otherwise. Accuracy in percent: mean over seeds, standard deviation after it. Differences are those to '
        f'{BASE} of the same seed, with 95 % confidence intervals (Student\'s t over seeds). Effective rank '
        'of the summaries\' maps (1 to r) and share of attention on summaries: means over '
        f'{RECORDED} test images, blocks and heads, before and after training.')
    pictures = [f'![learning curves, {TASKS[task].title}]({name}_{task}_curves.png)' for task in tasks_of(rows)]
    return '\n\n'.join([settings, tables(rows), *pictures, f'![accuracy by rank and by window]({name}_sweeps.png)'])


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each task."""
    return '\n\n'.join(
        '\n'.join([f'### {TASKS[task].title}', '', *table([row for row in rows if row['task'] == task])])
        for task in tasks_of(rows))


def tasks_of(rows: list[dict[str, Any]]) -> list[str]:
    return [task for task in TASKS if any(row['task'] == task for row in rows)]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one task, variants in order."""
    reads = 'digits' in rows[0]
    head = ['variant', 'seeds', 'parameters', 'accuracy', f'to {BASE}', 'cross-entropy, bits',
            *(['digits named'] if reads else []), 'effective rank', 'share of summaries']
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for variant in VARIANTS:
        runs = [row for row in rows if row['variant'] == variant]
        if not runs:
            continue
        bits = [row['cross_entropy'] / np.log(2) for row in runs]
        cells = [
            variant, str(len(runs)), f'{runs[0]["parameters"]:,}', spread([row['accuracy'] for row in runs], 2),
            '' if variant == BASE else interval(differences(rows, variant)), spread(bits, 3),
            *([spread([row['digits'] for row in runs], 1)] if reads else []),
            change(runs, 'maps_rank') if runs[0]['start']['maps_rank'] else '',
            change(runs, 'share') if runs[0]['start']['share'] else '']
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def change(runs: list[dict[str, Any]], name: str) -> str:
    """Means before and after training."""
    return ' → '.join(f'{statistics.mean(row[when][name] for row in runs):.2f}' for when in ('start', 'end'))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Learning curves of each task; accuracy by rank and by window."""
    check_available()
    from matplotlib.figure import Figure

    tasks = tasks_of(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        some = [row for row in rows if row['task'] == task]
        shown = {title: names for title, names in GROUPS.items() if any(row['variant'] in names for row in some)}
        figure = Figure(figsize=(2 + 3 * len(shown), 4.5), layout='constrained')
        for axes, (title, names) in zip(
                figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown.items(), strict=True):
            draw_curves(axes, some, {BASE: {}, **names})
            axes.set(title=title, xlabel='update')
        figure.axes[0].set_ylabel('training loss (nats)')
        figure.savefig(f'{path}_{task}_curves.png', dpi=100)
    figure = Figure(figsize=(9, 3.5 * len(tasks)), layout='constrained')
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for (i, task), (j, (name, variants)) in itertools.product(
            enumerate(tasks), enumerate({'rank': BY_RANK, 'window': BY_WINDOW}.items())):
        draw_sweep(grid[i, j], [row for row in rows if row['task'] == task], variants)
        grid[i, j].set(title=TASKS[task].title, xlabel=name, ylabel='accuracy (%)')
    figure.savefig(f'{path}_sweeps.png', dpi=100)


def draw_curves(axes: Any, rows: list[dict[str, Any]], variants: Iterable[str]) -> None:
    """Training loss by update, means over seeds with the range as a band."""
    for variant in variants:
        losses = [row['losses'] for row in rows if row['variant'] == variant]
        if losses:
            x = np.minimum(CHECKPOINT_STEPS * np.arange(1, len(losses[0]) + 1), rows[0]['steps'])
            line, = axes.plot(x, np.mean(losses, axis=0), label=variant)
            axes.fill_between(
                x, np.min(losses, axis=0), np.max(losses, axis=0), color=line.get_color(), alpha=.15, linewidth=0)
    axes.grid(alpha=.3)
    axes.legend(fontsize='small')


def draw_sweep(axes: Any, rows: list[dict[str, Any]], variants: dict[int, str]) -> None:
    """Accuracy by rank or window: every seed as a dot, and their mean."""
    found = {x: [row['accuracy'] for row in rows if row['variant'] == variant] for x, variant in variants.items()}
    found = {x: values for x, values in found.items() if values}
    places = [list(variants).index(x) for x in found]
    axes.plot(places, [statistics.mean(values) for values in found.values()])
    for place, values in zip(places, found.values(), strict=True):
        axes.plot([place] * len(values), values, 'k.', markersize=4)
    axes.set_xticks(range(len(variants)), [str(x) for x in variants])
    axes.grid(alpha=.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, VARIANTS, 'output/study', steps=4000)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--data-dir', default='data/cifar10', metavar='DIR', help='CIFAR-10 as an image folder')
    parser.add_argument('--batch', type=positive_int, default=16, help='images of an update')
    parser.add_argument('--lr', type=positive_number, default=2e-3, help='peak learning rate')
    parser.add_argument('--test-pairs', type=positive_int, default=TEST_PAIRS, help='pairs of digits that the test has')
    parser.add_argument('--publish', action='store_true', help='write the tables into docs/study.md')
    args = parser.parse_args(argv)
    try:
        rows = run_study(args)
        draw(rows, args.out / dated('study'))
        publish(args, 'study', rows, markdown(rows, dated('study')))
        if args.publish:
            link = f'[{dated("study")}](../benchmarks/results/{dated("study")}.md)'
            replace_section(PAGE, 'study', f'{link}\n\n{tables(rows)}')
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(f'\nInterrupted; {args.runs} holds what is done, the same command goes on from there')


if __name__ == '__main__':
    main()
