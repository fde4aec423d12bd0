#!/usr/bin/env python3
"""Train an image classifier with timm's library pieces; the long-short models are registered.

    python train_imagenet.py --config configs/cifar10.yaml
    python train_imagenet.py --config configs/cifar10.yaml --epochs 2 --experiment short

Arguments carry timm's names, in the YAML file and on the command line, which wins. One folder, `output/experiment`,
takes everything that a run leaves: last.pth.tar and model_best.pth.tar, args.yaml, summary.csv (a row per epoch),
learning_curve.png, predictions.png and attention.png.
"""
import argparse
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: idle compute threads sleep instead of spinning. Where the loader's processes, or
# anyone else's, share the few cores of a small machine, spinning made training up to ten times slower.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import get_outdir, random_seed, trim_summary, update_summary
from torch import nn

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.analysis import pictures
from ls_vision.training.checkpoint import load_weights, save_checkpoint
from ls_vision.training.config import parse_args, save_args
from ls_vision.training.engine import evaluate, train_one_epoch
from ls_vision.training.errors import UserError, first_line
from ls_vision.training.loaders import Datasets, create_datasets, create_loaders, resolve_num_classes, uses_mixup
from ls_vision.training.logs import Stopwatch, say
from ls_vision.training.state import TrainingState


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and draw; returns the final figures and the output folder."""
    try:
        return run(parse_args(argv))
    except UserError as e:
        sys.exit(f'error: {e}')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole job for checked arguments."""
    watch = Stopwatch()
    random_seed(args.seed)
    datasets = create_datasets(args)
    num_classes = resolve_num_classes(args, datasets)
    model = build_model(args, num_classes)
    data_config = resolve_input_data_config(model, args=vars(args))
    train_loader, val_loader = create_loaders(args, datasets, data_config, num_classes)
    state = build_state(args, model, updates_per_epoch=len(train_loader))
    output = create_output_folder(args, data_config)

    parameters = sum(p.numel() for p in model.parameters())
    say(f'{args.model}: {parameters / 1e6:.2f} M parameters, {num_classes} classes, input {data_config["input_size"]}')
    say(f'{len(datasets.train):,} training and {len(datasets.val):,} test images; writing to {output}')
    if not pictures.is_available():
        say(f'No pictures will be drawn: {pictures.INSTALL_HINT}')
    last = train(args, state, train_loader, val_loader, output, watch)

    # Read back what was written: the figures printed are those of the file that the run leaves.
    with watch.measure('evaluation'):
        load_weights(state.eval_model, last)
        result = evaluate(state.task, val_loader)
    if pictures.is_available():
        with watch.measure('pictures'):
            draw_pictures(args, state.eval_model, datasets, data_config, output)
    say(f'Test: top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} % on {result["images"]:,} images ({last})')
    say(f'Finished in {watch}. Everything is in {output}')
    return {**result, 'output': output}


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Create the model and load the weights it starts from."""
    if not timm.is_model(args.model.split('.')[0]) and ':' not in args.model:
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        raise UserError(f'unknown model {args.model!r}; ' + (
            f'did you mean {" or ".join(close)}?' if close else 'timm.list_models() lists the names'))
    try:
        model_args = resolve_model_input_args(
            args.model,
            vars(args),
            num_classes=num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **args.model_kwargs,
        )
        model = timm.create_model(pretrained=args.pretrained, **model_args)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'model {args.model} cannot be built with {args.model_kwargs}: {first_line(e)}') from e
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    model.to(args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_state(args: argparse.Namespace, model: nn.Module, updates_per_epoch: int) -> TrainingState:
    """Criterion, averaged weights if asked for, optimiser and schedule for a model."""
    task = ClassificationTask(
        model,
        criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=uses_mixup(args)),
        device=torch.device(args.device),
        verbose=False,
    )
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    except (TypeError, ValueError) as e:
        raise UserError(f'--opt {args.opt}: {first_line(e)}') from e
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f'--sched {args.sched}: {first_line(e)}') from e
    return TrainingState(task, optimizer, scheduler, num_epochs)


def create_output_folder(args: argparse.Namespace, data_config: dict[str, Any]) -> Path:
    """Make the run's folder, with its arguments in it and without the rows of an earlier run."""
    name = args.experiment or '-'.join(
        [time.strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    try:
        output = Path(get_outdir(args.output or 'output/train', name))
        save_args(args, output / 'args.yaml')
        trim_summary(output / 'summary.csv', start_epoch=0)
    except OSError as e:
        raise UserError(f'--output {args.output}: cannot be written: {e}') from e
    return output


def train(
        args: argparse.Namespace,
        state: TrainingState,
        train_loader: Any,
        val_loader: Any,
        output: Path,
        watch: Stopwatch,
) -> Path:
    """Train for all epochs, evaluating and saving after each; returns the last checkpoint's path."""
    last = None
    try:
        for epoch in range(state.num_epochs):
            state.epoch = epoch
            if args.mixup_off_epoch and state.epoch >= args.mixup_off_epoch:
                train_loader.mixup_enabled = False
            title = f'epoch {state.epoch + 1}/{state.num_epochs}'
            train_loss = train_one_epoch(state, train_loader, args, title, watch)
            with watch.measure('evaluation'):
                metrics = evaluate(state.task, val_loader)
            update_summary(state.epoch, dict(loss=train_loss), metrics, output / 'summary.csv', lr=state.lr)
            if state.scheduler is not None:
                state.scheduler.step(state.epoch + 1, metrics['top1'])
            is_best = metrics['top1'] > state.best_top1
            state.best_top1 = max(state.best_top1, metrics['top1'])
            last = save_checkpoint(output, state.checkpoint(args, metrics), is_best)
            say(f'{title}: train loss {train_loss:.4f}, test loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f} %')
    except KeyboardInterrupt:
        say(f'Interrupted. {f"The last complete epoch is in {last}" if last else "No epoch was complete."}')
        sys.exit(130)
    assert last is not None  # there is at least one epoch
    return last


def draw_pictures(
        args: argparse.Namespace,
        model: nn.Module,
        datasets: Datasets,
        data_config: dict[str, Any],
        output: Path,
) -> None:
    """Learning curve, predictions on test images, and what the attention looks at."""
    pictures.draw_learning_curve(output / 'summary.csv', output / 'learning_curve.png')
    samples = pictures.pick_samples(datasets.val, count=24, seed=args.seed)
    if samples is None:
        say('No pictures of predictions and attention: the dataset cannot be indexed.')
        return
    names = datasets.class_names
    pictures.draw_predictions(model, samples, data_config, names, output / 'predictions.png')
    if not pictures.draw_attention(model, samples, data_config, names, output / 'attention.png'):
        say(f'No attention.png: {args.model} has no long-short attention.')


if __name__ == '__main__':
    main()
