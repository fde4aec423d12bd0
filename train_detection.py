#!/usr/bin/env python3
"""Train a detector of torchvision on a timm backbone, on COCO or Pascal VOC annotations.

    python train_detection.py --config configs/detection/deepforest.yaml
    python train_detection.py --config configs/detection/deepforest.yaml --epochs 2 --experiment short
    torchrun --nproc_per_node 8 train_detection.py --config configs/detection/coco_retinanet_1x.yaml

All annotations are checked before training. All files of a run are in one folder, `output/experiment`: last.pth.tar
and model_best.pth.tar, args.yaml, summary.csv (a row per epoch), metrics.jsonl, and in pictures/ the detections in each
evaluated image, compared with the ground truth. `--resume auto` resumes a run that was stopped or killed; on the CPU
the result is bit-identical to that of an uninterrupted run.
"""
import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # see train_imagenet.py
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import unwrap_model
from torch import nn

import ls_vision  # noqa: F401  (registers the models)
from ls_vision.detection import AnnotationError, Annotations, build_detector, read_annotations
from ls_vision.detection.config import parse_args
from ls_vision.detection.datasets import DetectionDataset
from ls_vision.detection.engine import DetectionLoader, DetectionTask, find_objects, score
from ls_vision.detection.pictures import draw_detections, picture_names
from ls_vision.detection.transforms import create_train_transform
from ls_vision.models._checkpoint import load_weights
from ls_vision.runtime import randomness
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.logs import Stopwatch, say
from ls_vision.runtime.processes import Processes
from ls_vision.runtime.scripts import run_script
from ls_vision.training.checkpoint import BEST, LAST
from ls_vision.training.config import resolve_lr
from ls_vision.training.data_record import describe_annotations
from ls_vision.training.faults import FiniteGuard
from ls_vision.training.loaders import measure_loader
from ls_vision.training.state import TrainingState
from ls_vision.training.training_run import TrainingRun


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and draw; returns the final metrics and the output folder."""
    return run_script(parse_args, train, argv)


def train(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job for checked arguments."""
    watch = Stopwatch()
    randomness.prepare(args.seed, processes.rank, args.deterministic)
    args.lr = resolve_lr(args, processes.world_size)
    train_set, val_set = read_sets(args)
    loader = create_loader(args, train_set, processes)
    if args.dry_run_loader:
        return dict(training=measure_loader('training', loader.read(epoch=0)))
    model = build_model(args, len(train_set.class_names)).to(processes.device)
    state = build_state(args, model, processes, updates_per_epoch=-(-len(loader) // args.grad_accum_steps))
    state.class_names, state.data = train_set.class_names, describe_annotations(train_set)
    output = Path(args.output or 'output/detection') / (
        args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{args.detector}-{args.model}')
    run = TrainingRun(args, state, loader, output, watch)
    run.resume()

    parameters = sum(p.numel() for p in model.parameters())
    names = train_set.class_names
    say(f'{args.detector} on {args.model}: {parameters / 1e6:.2f} M parameters, {len(names)} classes: '
        f'{", ".join(names[:10])}{", ..." if len(names) > 10 else ""}')
    say(f'{len(train_set.images):,} training images with {train_set.num_objects:,} objects, {len(val_set.images):,} '
        f'with {val_set.num_objects:,} for evaluation; writing to {output}')
    run.train(lambda stop: evaluate(args, state, val_set), describe)
    return finish(args, state, val_set, output, watch)


def read_sets(args: argparse.Namespace) -> tuple[Annotations, Annotations]:
    """Read and check both sets; problems of both are reported together."""
    with_masks = args.detector == 'mask_rcnn'
    train_set = read_annotations(args.train_annotations, args.train_images, skip_bad=True, with_masks=with_masks)
    val_set = read_annotations(
        args.val_annotations, args.val_images, train_set.class_names, skip_bad=True, with_masks=with_masks)
    problems = train_set.problems + val_set.problems
    if problems and not args.skip_bad:
        raise AnnotationError(' and '.join(s.source for s in (train_set, val_set) if s.problems), problems)
    if problems:
        say(f'Left out {len(problems)} bad records:')
        for problem in problems:
            say(f'  {problem}')
    for note in train_set.notes + val_set.notes:
        say(note)
    for found in (train_set, val_set):
        if found.num_objects == found.num_crowds:
            what = f'all {found.num_objects} are crowds or difficult' if found.num_objects else 'none is left'
            raise UserError(f'{found.source}: no object to train on or to find: {what}')
    return train_set, val_set


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The detector with its initial weights."""
    try:
        model = build_detector(
            args.detector, args.model, num_classes, args.strides, args.out_channels, args.trainable_stages,
            args.grad_checkpointing, args.min_size, args.max_size, args.max_dets,
            backbone_kwargs=dict(pretrained=args.pretrained, drop_path_rate=args.drop_path, **args.model_kwargs),
            **args.detector_kwargs)
    except (AttributeError, OSError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{args.detector} on {args.model} cannot be built: {first_line(e)}') from e
    if args.initial_backbone:
        # a classifier's checkpoint, whose head and last norm are not needed
        load_weights(model.backbone.body.model, args.initial_backbone, ignore_unused=True)  # type: ignore[union-attr, arg-type]
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    return model


def create_loader(args: argparse.Namespace, train_set: Annotations, processes: Processes) -> DetectionLoader:
    """Augmented training batches."""
    transform = create_train_transform(
        args.crop_size, args.crop_scale, args.hflip, args.vflip, args.transpose, args.color_jitter,
        args.photometric_distort)
    dataset = DetectionDataset(train_set, transform, args.detector == 'mask_rcnn', args.crops_per_image, args.skip_bad)
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
    """Averaged weights if enabled, optimiser and schedule for a model."""
    task = DetectionTask(model, processes.device)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    settings = {**optimizer_kwargs(args), **args.opt_kwargs}
    settings.pop('layer_decay', None)  # the parameter groups apply it
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
    return TrainingState(
        task, optimizer, scheduler, scaler, guard, processes, num_epochs, updates_per_epoch, metric='AP')


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """Groups of the parameters that are trained: the backbone's, by layer with `layer_decay`, and all others.

    Weight decay is 0 for norms, biases and the parameters that the backbone excludes.
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


def evaluate(args: argparse.Namespace, state: TrainingState, val_set: Annotations) -> dict[str, float]:
    """COCO's metrics of the averaged weights, or of the model without an average; empty between evaluations."""
    epoch, task = state.progress.epoch + 1, state.task
    if epoch < state.num_epochs and epoch % args.eval_interval:
        return {}
    state.processes.share_buffers(task.get_trainable_module(), task.get_trainable_module(ema=True))
    return score(val_set, find_objects(state.eval_model, val_set, args, state.processes), args)


def describe(metrics: dict[str, float]) -> str:
    """The metrics of an epoch as text."""
    return ', '.join(f'{name} {metrics[name]:.4f}' for name in ('AP', 'AP50', 'AR'))


def finish(
        args: argparse.Namespace,
        state: TrainingState,
        val_set: Annotations,
        output: Path,
        watch: Stopwatch,
) -> dict[str, Any]:
    """Evaluate the best checkpoint of the run, and draw its detections."""
    state.processes.gather(None)  # wait until the first process has written it
    path = output / (BEST if (output / BEST).exists() else LAST)
    load_weights(unwrap_model(state.eval_model), path)
    with watch.measure('evaluation'):
        found = find_objects(state.eval_model, val_set, args, state.processes)
        metrics = score(val_set, found, args)
    if state.processes.is_primary:
        with watch.measure('pictures'):
            (output / 'pictures').mkdir(exist_ok=True)
            for image, name in zip(val_set.images, picture_names(val_set.images), strict=True):
                if image.image_id in found:  # it could be decoded
                    draw_detections(image, found[image.image_id], output / 'pictures' / name, args.picture_score)
    summary = ', '.join(f'{name} {metrics[name]:.4f}' for name in ('AP', 'AP50', 'AP75', 'AR'))
    say(f'{summary} at {args.max_dets} detections in each of {len(val_set.images):,} images ({path})')
    say(f'Finished in {watch}. Everything is in {output}')
    return {**metrics, 'output': output}


if __name__ == '__main__':
    main()
