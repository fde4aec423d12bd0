#!/usr/bin/env python3
"""Detectors on different backbones, all from scratch, after the same processor time of training.

    python -m ls_vision.data.deepforest --data-dir data/deepforest
    python benchmarks/detection_comparison.py --seconds 150

Recipe, detector and data are those of configs/detection/deepforest.yaml. Only the backbone differs, and the number of
updates, which depends on the processor seconds (of all threads) per update. The cosine schedule covers all updates.
Results go to benchmarks/results/, a JSON file and a Markdown table, after every backbone; a backbone with a result
there is not trained again.
"""
import argparse
import datetime
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from ls_vision.analysis.measure import describe_machine, write
from ls_vision.detection.config import parse_args as parse_training_args
from ls_vision.runtime.processes import Processes
from ls_vision.training.engine import update

sys.path.insert(0, str(Path(__file__).parents[1]))  # the training script lies beside the package

import train_detection

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'detection' / 'deepforest.yaml'
EPOCHS = 5


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / f'detection_comparison_{datetime.date.today():%Y-%m-%d}'
    saved = path.with_name(f'{path.name}.json')
    rows: list[dict[str, Any]] = json.loads(saved.read_text())['rows'] if saved.exists() else []
    for name, values in contenders().items():
        if any(row['name'] == name for row in rows):
            continue
        rows.append(dict(name=name, **train(name, values, args)))
        write(path, describe_machine('cpu', 'float32', args.threads), rows, markdown(rows, args))
    print(path.with_name(f'{path.name}.md').read_text())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=150., help='processor time of the training of each backbone')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of PyTorch')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results')
    return parser.parse_args()


def contenders() -> dict[str, dict[str, Any]]:
    """The changes that each makes to the config."""
    kwargs = yaml.safe_load(CONFIG.read_text())['model_kwargs']
    return {
        'long-short': {},
        'full attention': dict(model_kwargs={**kwargs, 'attn_types': 'full'}),
        'Swin-T': dict(model='swin_tiny_patch4_window7_224', model_kwargs={}),
        'ResNet-50': dict(model='resnet50', model_kwargs={}),
    }


def train(name: str, values: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train for as many updates as fit, and evaluate."""
    output = ROOT / 'output' / 'detection_comparison'
    output.mkdir(parents=True, exist_ok=True)
    config = {**yaml.safe_load(CONFIG.read_text()), **values}
    config.pop('initial_backbone')  # from scratch, as the others must
    config.update(epochs=EPOCHS, warmup_epochs=EPOCHS / 10, eval_interval=EPOCHS, workers=0, device='cpu',
                  output=str(output), experiment=name.replace(' ', '_'))
    path = output / f'{config["experiment"]}.yaml'
    path.write_text(yaml.safe_dump(config))
    seconds, parameters = seconds_per_update(path)
    updates_per_epoch = max(1, round(args.seconds / seconds / EPOCHS))
    crops = updates_per_epoch * config['batch_size']
    result = train_detection.main(['--config', str(path), '--crops-per-image', str(crops)])
    result.pop('output')
    return dict(parameters=parameters, seconds_per_update=seconds, updates=updates_per_epoch * EPOCHS, **result)


def seconds_per_update(config: Path, warmup: int = 2, count: int = 6) -> tuple[float, int]:
    """Processor seconds of an update without its data, and the number of parameters."""
    args = parse_training_args(['--config', str(config)])
    processes = Processes(torch.device('cpu'))
    train_set, _ = train_detection.read_sets(args)
    batches = list(islice(train_detection.create_loader(args, train_set, processes).read(0), warmup + count))
    model = train_detection.build_model(args, len(train_set.class_names))
    state = train_detection.build_state(args, model, processes, updates_per_epoch=1000)
    state.task.train()
    start = 0.
    for i, batch in enumerate(batches):
        if i == warmup:
            start = time.process_time()
        update(state, [batch], args, 'timing')
    return (time.process_time() - start) / count, sum(p.numel() for p in model.parameters())


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [f'FCOS from scratch, {args.seconds:g} processor seconds of training each, on the held-out photograph.', '',
             '| backbone | parameters, M | s per update | updates | AP | AP50 | AR |', '|---|---|---|---|---|---|---|']
    lines += [
        f'| {r["name"]} | {r["parameters"] / 1e6:.1f} | {r["seconds_per_update"]:.2f} | {r["updates"]} | '
        f'{r["AP"]:.3f} | {r["AP50"]:.3f} | {r["AR"]:.3f} |' for r in rows]
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
