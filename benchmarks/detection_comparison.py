#!/usr/bin/env python3
"""Detectors on different backbones, all from scratch: precision after equal updates and after equal processor time.

    python -m ls_vision.data.deepforest --data-dir data/deepforest
    python benchmarks/detection_comparison.py                              # every run that is not finished
    python benchmarks/detection_comparison.py --variants long-short --seeds 0
    python benchmarks/detection_comparison.py --report                     # table and plot of the finished runs

Recipe, detector and data are those of configs/detection/deepforest.yaml, without its start from CIFAR-10. A variant
differs from long-short attention in what its name says. After the warm-up the learning rate stays as it is and the
averaged weights are evaluated, so that one run shows the precision after any number of updates and after any time.
Time is that of all threads of the process, for data and updates; evaluation is not counted. All variants of a seed see
the same crops in the same order; with jittered colours instead of distorted ones, these look different. At the end the
detector also reads the whole photograph at once, with torchvision's 1,000 candidates a level, and with ten for each of
its detections.
"""
import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # idle threads sleep, because the machine may be shared

import torch
import yaml
from timm.utils import unwrap_model
from tqdm import tqdm
from training_runs import add_arguments, dated, interval, publish, run_all, spread

from ls_vision.analysis.pictures import check_available
from ls_vision.detection.config import parse_args as parse_training_args
from ls_vision.detection.engine import DetectionLoader, find_objects, score
from ls_vision.runtime import randomness
from ls_vision.runtime.arguments import positive_int, positive_number
from ls_vision.runtime.devices import is_out_of_memory
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import write_text
from ls_vision.runtime.processes import Processes
from ls_vision.training.engine import Batch, update

sys.path.insert(0, str(Path(__file__).parents[1]))  # the training script lies beside the package

import train_detection

CONFIG = yaml.safe_load((Path(__file__).parents[1] / 'configs' / 'detection' / 'deepforest.yaml').read_text())
BASE = 'long-short'
VARIANTS: dict[str, dict[str, Any]] = {  # what each changes in the config
    BASE: {},
    'jittered colours': dict(color_jitter=.2, photometric_distort=0.),  # long-short as well, less change of colours
    'window only': dict(model_kwargs={**CONFIG['model_kwargs'], 'rank': 0}),
    'full attention': dict(model_kwargs={**CONFIG['model_kwargs'], 'attn_types': 'full'}),
    'Swin-T': dict(model='swin_tiny_patch4_window7_224', model_kwargs={}),
    'ResNet-50': dict(model='resnet50', model_kwargs={}),
}
WARMUP = 20  # updates
METRICS = ('AP', 'AP50', 'AR')


# ---- runs ------------------------------------------------------------------------------------------------------------

def run_case(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Trains a detector past the last number of updates and the last time, and evaluates it at each."""
    path = path_of(args, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = training_config(path, variant, seed)
    processes = Processes(torch.device('cpu'))
    randomness.prepare(seed, processes.rank, deterministic=False)
    train_set, val_set = train_detection.read_sets(config)
    loader = train_detection.create_loader(config, train_set, processes)
    model = train_detection.build_model(config, len(train_set.class_names))
    state = train_detection.build_state(config, model, processes, updates_per_epoch=WARMUP)

    def evaluate() -> dict[str, float]:
        metrics = score(val_set, find_objects(state.eval_model, val_set, config, processes), config)
        return {name: metrics[name] for name in METRICS}

    points: list[dict[str, Any]] = []
    losses: list[float] = []
    seconds, batches = 0., endless(loader)
    with tqdm(total=round(max(args.seconds)), desc=path.name, unit='s', disable=None) as progress:
        while seconds < max(args.seconds) or len(losses) < max(args.updates):
            begin, before = time.process_time(), seconds
            state.task.train()
            losses.append(update(state, [next(batches)], config, path.name)[0])
            seconds += time.process_time() - begin
            progress.update(min(seconds, progress.total) - progress.n)
            if len(losses) in args.updates or any(before < limit <= seconds for limit in args.seconds):
                points.append(dict(updates=len(losses), seconds=seconds, **evaluate()))
    config.tile_size = None
    detector = unwrap_model(state.eval_model)
    whole: dict[str, Any] = {}
    for candidates in (detector.topk_candidates, 1000):
        detector.topk_candidates = candidates
        try:
            whole[str(candidates)] = evaluate()
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            whole[str(candidates)] = None
    result = dict(
        variant=variant, seed=seed, parameters=sum(p.numel() for p in model.parameters()), points=points, whole=whole,
        losses=losses)
    write_text(path.with_suffix('.json'), json.dumps(result, indent=1) + '\n')
    return result


def training_config(path: Path, variant: str, seed: int) -> argparse.Namespace:
    """The demo's arguments, from scratch, with a constant learning rate after the warm-up."""
    config = {**CONFIG, **VARIANTS[variant]}
    config.pop('initial_backbone')
    config.update(
        tile_size=config['crop_size'], crops_per_image=WARMUP * config['batch_size'], warmup_epochs=1,
        epochs=10 ** 6, min_lr=config['lr'], workers=0, device='cpu', seed=seed)
    file = path.with_suffix('.yaml')
    write_text(file, yaml.safe_dump(config))
    return parse_training_args(['--config', str(file)])


def endless(loader: DetectionLoader) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from loader.read(epoch)
        epoch += 1


def path_of(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Runs that are evaluated at other points lie in other folders and are never mixed with these."""
    updates, seconds = ('-'.join(f'{limit:g}' for limit in sorted(limits)) for limits in (args.updates, args.seconds))
    return args.runs / f'{updates}_updates_{seconds}_seconds' / f'{variant.replace(" ", "-")}_{seed}'


# ---- report ----------------------------------------------------------------------------------------------------------

def markdown(rows: list[dict[str, Any]], args: argparse.Namespace, name: str) -> str:
    updates, seconds = max(args.updates), max(args.seconds)
    return '\n\n'.join([
        f'FCOS from scratch on one aerial photograph, tested on another in tiles of {CONFIG["crop_size"]} pixels, at '
        f'most {CONFIG["max_dets"]} detections. AP50: mean over seeds, standard deviation after it. Differences to '
        f'{BASE} of the same seed, with 95 % confidence intervals (Student\'s t over seeds). The last columns: the '
        'whole photograph at once after all updates, by the candidates that are kept at a level.',
        tables(rows, updates, seconds), f'![precision by updates and by time]({name}.png)'])


def tables(rows: list[dict[str, Any]], updates: int, seconds: float) -> str:
    """AP50 of each variant after `updates` and after `seconds`."""
    head = ['backbone', 'parameters, M', 'seeds', f'AP50, {updates} updates', f'to {BASE}', 'updates',
            f'AP50, {seconds:g} s', f'to {BASE}', *(f'whole, {n} candidates' for n in rows[0]['whole'])]
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for variant in VARIANTS:
        runs = [row for row in rows if row['variant'] == variant]
        if not runs:
            continue
        after_updates, after_time = ([at(row, key, limit) for row in runs] for key, limit in
                                     (('updates', updates), ('seconds', seconds)))
        lines.append('| ' + ' | '.join([
            variant, f'{runs[0]["parameters"] / 1e6:.1f}', str(len(runs)),
            spread([point['AP50'] for point in after_updates], 3), differences(rows, variant, 'updates', updates),
            f'{statistics.mean(point["updates"] for point in after_time):.0f}',
            spread([point['AP50'] for point in after_time], 3), differences(rows, variant, 'seconds', seconds),
            *(spread([row['whole'][n]['AP50'] for row in runs], 3) if all(row['whole'][n] for row in runs)
              else 'out of memory' for n in rows[0]['whole'])]) + ' |')
    return '\n'.join(lines)


def at(row: dict[str, Any], key: str, limit: float) -> dict[str, Any]:
    """The first evaluation of a run that had this many updates or seconds."""
    return next(point for point in row['points'] if point[key] >= limit)


def differences(rows: list[dict[str, Any]], variant: str, key: str, limit: float) -> str:
    """AP50 minus that of long-short attention of the same seed."""
    if variant == BASE:
        return ''
    base = {row['seed']: at(row, key, limit)['AP50'] for row in rows if row['variant'] == BASE}
    return interval([at(row, key, limit)['AP50'] - base[row['seed']]
                     for row in rows if row['variant'] == variant and row['seed'] in base], 3)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """AP50 of every run by updates and by processor time."""
    check_available()
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    for axes, key, label in zip(
            figure.subplots(1, 2, sharey=True), ('updates', 'seconds'), ('update', 'processor seconds'), strict=True):
        for i, variant in enumerate(VARIANTS):
            runs = [row for row in rows if row['variant'] == variant]
            for row in runs:
                points = row['points']
                axes.plot([p[key] for p in points], [p['AP50'] for p in points], f'C{i}.-', linewidth=1,
                          label=variant if row is runs[0] else None)
        axes.set(xlabel=label)
        axes.grid(alpha=.3)
        axes.legend(fontsize='small')
    figure.axes[0].set(ylabel='AP50 on the held-out photograph', ylim=(0, None))
    figure.savefig(path.with_suffix('.png'), dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, VARIANTS, 'output/detection_comparison')
    parser.add_argument('--updates', nargs='+', type=positive_int, default=[50, 100], help='evaluate after these')
    parser.add_argument('--seconds', nargs='+', type=positive_number, default=[60, 120, 180, 240],
                        help='and after these')
    args = parser.parse_args(argv)
    try:
        rows = run_all(args, functools.partial(path_of, args), functools.partial(run_case, args))
        if not rows:
            raise UserError(f'{args.runs} holds no finished run')
        name = dated('detection_comparison')
        draw(rows, args.out / name)
        publish(args, 'detection_comparison', rows, markdown(rows, args, name))
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(f'\nInterrupted; {args.runs} holds the finished runs; the same command repeats the one that was cut')


if __name__ == '__main__':
    main()
