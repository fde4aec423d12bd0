#!/usr/bin/env python3
"""Train an image classifier with timm's library pieces; the long-short models are registered.

    python train_imagenet.py --config configs/cifar10.yaml
    python train_imagenet.py --config configs/cifar10.yaml --epochs 2 --experiment short
    torchrun --nproc_per_node 8 train_imagenet.py --config configs/vil_ls_medium_224.yaml --data-dir imagenet
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29400 train_imagenet.py ...
    torchrun --nproc_per_node 8 train_imagenet.py --model vil_ls_tiny_linear --img-size 4096 --space-parallel 4 ...

Arguments have timm's names, in the YAML file and on the command line, which wins. All files of a run are in one
folder, `output/experiment`: last.pth.tar, the checkpoint before it and model_best.pth.tar, args.yaml, summary.csv (a
row per epoch), metrics.jsonl (a line per logged update and epoch), learning_curve.png, predictions.png, attention.png.

SIGTERM and Ctrl-C save and exit. `--experiment NAME --resume auto` starts a run or resumes it; on a CPU the result is
bit-identical to that of an uninterrupted run.
"""
import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# OpenMP reads these when torch is loaded: idle compute threads spin for microseconds (1,000 turns), then sleep. Endless
# spinning made training up to ten times slower where loader processes share the few cores of a small machine. Sleeping
# at once made models with many small operations twice as slow.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from timm.data import resolve_input_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from torch import nn

from ls_vision.analysis import pictures
from ls_vision.analysis.zoo import check_model
from ls_vision.evaluation.classifier import create_classifier
from ls_vision.models._checkpoint import load_weights
from ls_vision.parallel.scripts import share_images, split_model
from ls_vision.runtime import randomness
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.logs import Stopwatch, say
from ls_vision.runtime.processes import Processes
from ls_vision.runtime.scripts import run_script
from ls_vision.training.checkpoint import LAST
from ls_vision.training.config import parse_args, resolve_lr
from ls_vision.training.data_record import describe_samples
from ls_vision.training.engine import evaluate
from ls_vision.training.faults import FiniteGuard
from ls_vision.training.loaders import (
    Datasets,
    create_datasets,
    create_loaders,
    measure_loader,
    resolve_num_classes,
    uses_mixup,
)
from ls_vision.training.state import TrainingState
from ls_vision.training.training_run import TrainingRun


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and draw; returns the final metrics and the output folder."""
    return run_script(parse_args, train, argv)


def train(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job for checked arguments."""
    watch = Stopwatch()
    processes = share_images(processes, args.space_parallel)
    randomness.prepare(args.seed, processes.rank, args.deterministic)
    args.lr = resolve_lr(args, processes.world_size)
    datasets = create_datasets(args)
    num_classes = resolve_num_classes(args, datasets)
    model = build_model(args, num_classes, processes)
    try:
        data_config = resolve_input_data_config(model, args=vars(args))
    except ValueError as e:
        raise UserError(f'--img-size, --mean or --std: {first_line(e)}') from e
    split_model(model, processes, data_config['input_size'])
    train_loader, val_loader = create_loaders(args, datasets, data_config, num_classes, processes)
    if args.dry_run_loader:
        return dict(
            training=measure_loader('training', train_loader.read(epoch=0)),
            evaluation=measure_loader('evaluation', val_loader))

    parameters = sum(p.numel() for p in model.parameters())
    say(f'{args.model}: {parameters / 1e6:.2f} M parameters, {num_classes} classes, input {data_config["input_size"]}')
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    state = build_state(args, model, updates_per_epoch, processes)
    state.class_names, state.data = datasets.class_names, describe_samples(datasets.train)
    output = output_folder(args, data_config)
    run = TrainingRun(args, state, train_loader, output, watch)
    run.resume()
    say(f'{len(datasets.train):,} training and {len(datasets.val):,} test images; writing to {output}')
    images_at_once = args.batch_size * args.grad_accum_steps * processes.world_size
    say(f'Updates of {images_at_once} images, peak learning rate {args.lr:g}')
    if not pictures.is_available():
        say(f'No pictures will be drawn: {pictures.INSTALL_HINT}')
    run.train(lambda stop: evaluate(state, val_loader, args, stop), describe)

    result = state.progress.metrics
    if pictures.is_available() and processes.is_primary:
        with watch.measure('pictures'):
            draw_pictures(args, state.eval_model, datasets, data_config, output)
    say(f'Test: top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} % on {result["images"]:,} images '
        f'({output / LAST})')
    say(f'Finished in {watch}. Everything is in {output}')
    return {**result, 'output': output}


def build_model(args: argparse.Namespace, num_classes: int, processes: Processes) -> nn.Module:
    """The model with its initial weights."""
    check_model(args.model)
    model = create_classifier(args, num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    if args.initial_checkpoint or args.pretrained_path:
        load_weights(model, args.initial_checkpoint or args.pretrained_path, new_classifier=bool(args.pretrained_path))
    model.to(processes.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.sync_bn and processes.device.type == 'cpu':
        raise UserError('--sync-bn: torch supports it on GPUs only')
    return convert_sync_batchnorm(model) if args.sync_bn and processes.world_size > 1 else model


def build_state(
        args: argparse.Namespace,
        model: nn.Module,
        updates_per_epoch: int,
        processes: Processes,
) -> TrainingState:
    """Criterion, averaged weights if enabled, optimiser and schedule for a model."""
    task = ClassificationTask(
        model,
        criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=uses_mixup(args)),
        device=processes.device,
        verbose=False,
    )
    try:
        optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), **args.opt_kwargs})
    except (TypeError, ValueError) as e:
        raise UserError(f'--opt {args.opt}: {first_line(e)}') from e
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f'--sched {args.sched}: {first_line(e)}') from e
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if processes.world_size > 1:
        task.prepare_distributed(device_ids=processes.device_ids, process_group=processes.group)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp and args.amp_dtype == 'float16')
    guard = FiniteGuard(args.max_nonfinite, f'try a lower --lr than {args.lr:g}, or --clip-grad 1')
    return TrainingState(task, optimizer, scheduler, scaler, guard, processes, num_epochs, updates_per_epoch)


def output_folder(args: argparse.Namespace, data_config: dict[str, Any]) -> Path:
    """The run's folder."""
    name = args.experiment or '-'.join(
        [time.strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    return Path(args.output or 'output/train') / name


def describe(metrics: dict[str, float]) -> str:
    """The test metrics of an epoch as text."""
    text = f'test loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f} %'
    if metrics['unreadable']:
        text += f', {metrics["unreadable"]} test images unreadable, counted as wrong'
    return text


def draw_pictures(
        args: argparse.Namespace,
        model: nn.Module,
        datasets: Datasets,
        data_config: dict[str, Any],
        output: Path,
) -> None:
    """Draw the learning curve, predictions on test images, and attention maps."""
    pictures.draw_learning_curve(output / 'summary.csv', output / 'learning_curve.png')
    if args.space_parallel > 1:
        say('No pictures of predictions and attention: --space-parallel leaves no process with the whole model.')
        return
    samples = pictures.pick_samples(datasets.val, count=24, seed=args.seed)
    if samples is None:
        say('No pictures of predictions and attention: no image can be read, or the dataset cannot be indexed.')
        return
    names = datasets.class_names
    pictures.draw_predictions(model, samples, data_config, names, output / 'predictions.png')
    if not pictures.draw_attention(model, samples, data_config, names, output / 'attention.png'):
        say(f'No attention.png: {args.model} has no long-short attention.')


if __name__ == '__main__':
    main()
