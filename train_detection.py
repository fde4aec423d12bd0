#!/usr/bin/env python3
"""Train a detector of torchvision on a timm backbone, on COCO or Pascal VOC annotations.

    python train_detection.py --config configs/detection/deepforest.yaml
    python train_detection.py --config configs/detection/deepforest.yaml --epochs 2 --experiment short
    torchrun --nproc_per_node 8 train_detection.py --config configs/detection/coco_retinanet_1x.yaml

All annotations are checked before anything is trained. One folder, `output/experiment`, takes everything that a run
leaves: last.pth.tar and model_best.pth.tar, args.yaml, summary.csv (a row per epoch), metrics.jsonl, and in pictures/
what was found in each evaluated image beside what is there. `--resume auto` goes on where a run was stopped or killed,
to the last bit (on the CPU) as if it had not been.
"""
import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # see train_imagenet.py
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import random_seed, unwrap_model
from torch import nn

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.detection import AnnotationError, Annotations, build_detector, read_annotations
from ls_vision.detection.config import parse_args
from ls_vision.detection.datasets import DetectionDataset
from ls_vision.detection.engine import DetectionLoader, DetectionTask, find_objects, score
from ls_vision.detection.pictures import draw_detections
from ls_vision.detection.transforms import create_train_transform
from ls_vision.training.checkpoint import BEST, LAST, load_checkpoint, load_latest, load_weights, save_checkpoint
from ls_vision.training.config import resolve_lr, save_args
from ls_vision.training.distributed import Processes, join_processes
from ls_vision.training.engine import Stopped, train_one_epoch
from ls_vision.training.errors import UserError, first_line
from ls_vision.training.faults import FiniteGuard
from ls_vision.training.loaders import measure_loader
from ls_vision.training.logs import Stopwatch, say
from ls_vision.training.metrics import MetricLog
from ls_vision.training.randomness import make_deterministic
from ls_vision.training.signals import StopRequest
from ls_vision.training.state import TrainingState


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and draw; returns the final figures and the output folder."""
    try:
        args = parse_args(argv)
        if args.deterministic:
            make_deterministic()
        processes = join_processes(args.device)
        try:
            return run(args, processes)
        finally:
            processes.close()
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job for checked arguments."""
    watch = Stopwatch()
    random_seed(args.seed, processes.rank)
    args.lr = resolve_lr(args, processes.world_size)
    train_set, val_set = read_sets(args)
    loader = create_loader(args, train_set, processes)
    if args.dry_run_loader:
        return dict(training=measure_loader('training', loader.read(epoch=0)))
    model = build_model(args, len(train_set.class_names)).to(processes.device)
    state = build_state(args, model, processes, updates_per_epoch=-(-len(loader) // args.grad_accum_steps))
    output = Path(args.output or 'output/detection') / (
        args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{args.detector}-{args.model}')
    resume(args, state, output)

    parameters = sum(p.numel() for p in model.parameters())
    names = train_set.class_names
    say(f'{args.detector} on {args.model}: {parameters / 1e6:.2f} M parameters, {len(names)} classes: '
        f'{", ".join(names[:10])}{", ..." if len(names) > 10 else ""}')
    say(f'{len(train_set.images):,} training images with {train_set.num_objects:,} objects, {len(val_set.images):,} '
        f'with {val_set.num_objects:,} for evaluation; writing to {output}')
    run_to_the_end(args, state, loader, val_set, output, watch)
    return finish(args, state, val_set, output, watch)


def read_sets(args: argparse.Namespace) -> tuple[Annotations, Annotations]:
    """Both sets, every record of them checked; problems of both are reported together."""
    train_set = read_annotations(args.train_annotations, args.train_images, skip_bad=True)
    val_set = read_annotations(
        args.val_annotations, args.val_images, class_names=train_set.class_names, skip_bad=True)
    problems = train_set.problems + val_set.problems
    if problems and not args.skip_bad:
        raise AnnotationError(' and '.join(s.source for s in (train_set, val_set) if s.problems), problems)
    if problems:
        say(f'Left out {len(problems)} bad records:')
        for problem in problems:
            say(f'  {problem}')
    return train_set, val_set


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The detector and the weights it starts from."""
    try:
        model = build_detector(
            args.detector, args.model, num_classes, args.strides, args.out_channels, args.trainable_stages,
            args.grad_checkpointing, args.min_size, args.max_size, args.max_dets,
            backbone_kwargs=dict(pretrained=args.pretrained, drop_path_rate=args.drop_path, **args.model_kwargs),
            **args.detector_kwargs)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{args.detector} on {args.model} cannot be built: {first_line(e)}') from e
    if args.initial_backbone:
        load_backbone(model, args.initial_backbone)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    return model


def load_backbone(model: nn.Module, path: str) -> None:
    """Start the backbone from a classifier's checkpoint, of which head and last norm are not needed."""
    body: Any = model.backbone.body.model  # type: ignore[union-attr]
    checkpoint = load_checkpoint(path)
    weights = next((checkpoint[key] for key in ('state_dict_ema', 'state_dict') if key in checkpoint), checkpoint)
    if hasattr(body, 'filter_state_dict'):
        weights = body.filter_state_dict(weights)
    wanted = body.state_dict()
    missing = [name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape]
    if missing:
        raise UserError(
            f'--initial-backbone {path} does not fit: {len(missing)} of {len(wanted)} weights are missing or of '
            f'another shape, e.g. {", ".join(missing[:3])}')
    body.load_state_dict({name: weights[name] for name in wanted})


def create_loader(args: argparse.Namespace, train_set: Annotations, processes: Processes) -> DetectionLoader:
    """Augmented training batches."""
    transform = create_train_transform(
        args.crop_size, args.crop_scale, args.hflip, args.vflip, args.transpose, args.color_jitter)
    dataset = DetectionDataset(train_set, transform, args.detector == 'mask_rcnn', args.crops_per_image)
    if len(dataset) < args.batch_size * processes.world_size:
        raise UserError(
            f'--batch-size {args.batch_size} on {processes.world_size} processes exceeds the {len(dataset)} samples of '
            'an epoch: lower it, or raise --crops-per-image')
    return DetectionLoader(dataset, args, processes)


def build_state(
        args: argparse.Namespace,
        model: nn.Module,
        processes: Processes,
        updates_per_epoch: int,
) -> TrainingState:
    """Averaged weights if asked for, optimiser and schedule for a model."""
    task = DetectionTask(model, processes.device)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    settings = {**optimizer_kwargs(args), **args.opt_kwargs}
    settings.pop('layer_decay', None)  # applied by the groups
    try:
        groups = parameter_groups(model, args.weight_decay, args.layer_decay)
        optimizer = create_optimizer_v2(groups, **settings)
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f'--opt {args.opt} with --sched {args.sched}: {first_line(e)}') from e
    if processes.world_size > 1:
        task.prepare_distributed(processes.device_ids)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp and args.amp_dtype == 'float16')
    guard = FiniteGuard(args.max_nonfinite, f'try a lower --lr than {args.lr:g}, or --clip-grad 1')
    return TrainingState(task, optimizer, scheduler, scaler, guard, processes, num_epochs, metric='AP')


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """The backbone's parameters, layer by layer if its learning rate is to decay, and all others; none that is frozen.

    Norms, biases and what the backbone names are not decayed.
    """
    body: Any = model.backbone.body.model  # type: ignore[union-attr]
    unwanted = body.no_weight_decay() if hasattr(body, 'no_weight_decay') else ()
    if layer_decay is None:
        groups = param_groups_weight_decay(body, weight_decay, no_weight_decay_list=unwanted)
    else:
        groups = param_groups_layer_decay(body, weight_decay, unwanted, layer_decay=layer_decay)
    inside = {id(p) for p in body.parameters()}
    others = nn.ParameterList([p for p in model.parameters() if id(p) not in inside])
    return [group for group in [*groups, *param_groups_weight_decay(others, weight_decay)] if group['params']]


def resume(args: argparse.Namespace, state: TrainingState, output: Path) -> None:
    """Go back to the checkpoint that --resume names, if it does."""
    if not args.resume:
        return
    checkpoint = load_latest(output, say) if args.resume == 'auto' else load_checkpoint(args.resume)
    if checkpoint is None:
        say(f'{output} holds no checkpoint yet: the run starts anew')
        return
    path = str(output / LAST) if args.resume == 'auto' else args.resume
    state.load(checkpoint, args, path)
    progress = state.progress
    say(f'Going on from {path}: epoch {progress.epoch + 1}, batch {progress.batch}, update {progress.num_updates}')


def run_to_the_end(
        args: argparse.Namespace,
        state: TrainingState,
        loader: DetectionLoader,
        val_set: Annotations,
        output: Path,
        watch: Stopwatch,
) -> None:
    """Train until all epochs are done, or until a signal says to stop: then save and exit."""
    log = None
    if state.processes.is_primary:
        try:
            output.mkdir(parents=True, exist_ok=True)
            save_args(args, output / 'args.yaml')
        except OSError as e:
            raise UserError(f'--output {args.output}: cannot be written: {e}') from e
        wandb = dict(project=args.wandb_project, name=output.name, config=vars(args)) if args.log_wandb else None
        log = MetricLog(output, state.progress.epoch, state.progress.num_updates, args.log_tensorboard, wandb)
    try:
        with StopRequest() as stop:
            train(args, state, loader, val_set, output, log, stop, watch)
    except Stopped as e:
        save(args, state, output)
        say(f'Stopped by signal {e.signal_number} after update {state.progress.num_updates}, which is in '
            f'{output / LAST}; go on with --resume auto')
        sys.exit(128 + e.signal_number)
    finally:
        if log is not None:
            log.close()


def train(
        args: argparse.Namespace,
        state: TrainingState,
        loader: DetectionLoader,
        val_set: Annotations,
        output: Path,
        log: MetricLog | None,
        stop: StopRequest,
        watch: Stopwatch,
) -> None:
    """Train the epochs that are left, evaluating, logging and saving after each."""
    progress = state.progress

    def after_update(loss: float) -> None:
        if log is not None and progress.num_updates % args.log_interval == 0:
            log.log_step(progress.epoch, progress.num_updates, loss=loss, lr=state.lr)
        if args.recovery_interval and progress.num_updates % args.recovery_interval == 0:
            save(args, state, output)

    while progress.epoch < state.num_epochs:
        title = f'epoch {progress.epoch + 1}/{state.num_epochs}'
        train_one_epoch(state, loader, args, title, watch, stop, after_update)
        is_last = progress.epoch + 1 == state.num_epochs
        metrics: dict[str, float] = {}
        if is_last or (progress.epoch + 1) % args.eval_interval == 0:
            metrics = evaluate(args, state, val_set, watch)
        loss = state.mean_loss()
        if log is not None:
            log.log_epoch(progress.epoch, progress.num_updates, train_loss=loss, **metrics, lr=state.lr)
        end_epoch(state, metrics)
        save(args, state, output, is_best=metrics.get('AP') == progress.best_metric)
        figures = [f'{name} {metrics[name]:.4f}' for name in ('AP', 'AP50', 'AR') if name in metrics]
        say(', '.join([f'{title}: train loss {loss:.4f}', *figures]))


def evaluate(
        args: argparse.Namespace,
        state: TrainingState,
        val_set: Annotations,
        watch: Stopwatch,
) -> dict[str, float]:
    """COCO's metrics of the averaged weights, or of the model where there is no average."""
    task = state.task
    state.processes.share_buffers(task.get_trainable_module(), task.get_trainable_module(ema=True))
    with watch.measure('evaluation'):
        return score(val_set, find_objects(state.eval_model, val_set, args, state.processes), args)


def end_epoch(state: TrainingState, metrics: dict[str, float]) -> None:
    """Move on to the next epoch."""
    progress = state.progress
    if state.scheduler is not None:
        state.scheduler.step(progress.epoch + 1, metrics.get('AP'))
    progress.metrics = metrics
    progress.best_metric = max(progress.best_metric, metrics.get('AP', -1.))
    progress.epoch += 1
    progress.batch = 0
    state.loss_sum, state.num_images = 0., 0


def save(args: argparse.Namespace, state: TrainingState, output: Path, is_best: bool = False) -> None:
    """Write the checkpoint; every process calls it, the first one writes."""
    content = state.checkpoint(args, unreadable=torch.zeros(0, dtype=torch.long))
    if state.processes.is_primary:
        save_checkpoint(output, content, is_best)


def finish(
        args: argparse.Namespace,
        state: TrainingState,
        val_set: Annotations,
        output: Path,
        watch: Stopwatch,
) -> dict[str, Any]:
    """Evaluate the best file that the run leaves, and draw what it finds."""
    state.processes.gather(None)  # the first one has written it
    path = output / (BEST if (output / BEST).exists() else LAST)
    load_weights(unwrap_model(state.eval_model), path)
    with watch.measure('evaluation'):
        found = find_objects(state.eval_model, val_set, args, state.processes)
        metrics = score(val_set, found, args)
    if state.processes.is_primary:
        with watch.measure('pictures'):
            (output / 'pictures').mkdir(exist_ok=True)
            for image in val_set.images:
                picture = output / 'pictures' / f'{image.path.stem}.png'
                draw_detections(image, found[image.image_id], picture, args.picture_score)
    figures = ', '.join(f'{name} {metrics[name]:.4f}' for name in ('AP', 'AP50', 'AP75', 'AR'))
    say(f'{figures} at {args.max_dets} detections in each of {len(val_set.images):,} images ({path})')
    say(f'Finished in {watch}. Everything is in {output}')
    return {**metrics, 'output': output}


if __name__ == '__main__':
    main()
