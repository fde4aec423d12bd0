"""One pass over the data: training and evaluation."""
import argparse
import math
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor

from .errors import UserError
from .logs import Progress, Stopwatch
from .state import TrainingState


def train_one_epoch(
        state: TrainingState,
        loader: Any,
        args: argparse.Namespace,
        title: str,
        watch: Stopwatch,
) -> float:
    """Train on every batch once.

    Args:
        state: What is trained.
        loader: Training batches, already on the device.
        args: The run's arguments.
        title: What the progress display calls this pass.
        watch: Takes the seconds of training and of waiting for data.

    Returns:
        Mean training loss.
    """
    state.task.train()
    total_loss, num_images = 0., 0
    batches = iter(loader)
    with Progress(title, len(loader), args.log_interval) as progress:
        for _ in range(len(loader)):
            with watch.measure('waiting for data'):
                images, targets = next(batches)
            with watch.measure('training'):
                loss = train_step(state, images, targets, args)
            if not math.isfinite(loss):
                raise UserError(
                    f'loss {loss} at update {state.num_updates} ({title}): nothing was saved after the last complete '
                    f'epoch; try a lower --lr than {args.lr:g}, or --clip-grad 1')
            total_loss += loss * len(images)
            num_images += len(images)
            progress.update(loss=total_loss / num_images, lr=state.lr)
    return total_loss / num_images


def train_step(state: TrainingState, images: Tensor, targets: Tensor, args: argparse.Namespace) -> float:
    """One update of the weights, of their average and of the learning rate; returns the loss."""
    task = state.task
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    loss = task(images, targets)['loss']
    state.optimizer.zero_grad()
    loss.backward()
    if args.clip_grad is not None:
        parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
    state.optimizer.step()

    state.num_updates += 1
    task.update_ema(step=state.num_updates)
    if state.scheduler is not None:
        state.scheduler.step_update(num_updates=state.num_updates)
    return loss.item()


@torch.inference_mode()
def evaluate(task: TrainingTask, loader: Any, title: str = 'test') -> dict[str, float]:
    """Loss and accuracy of the averaged weights, or of the model where there is no average.

    Returns:
        `loss`, `top1` and `top5` in percent, and `images`, the number they were taken over.
    """
    task.eval()
    model = task.get_eval_model(ema=task.has_ema())
    assert model is not None
    evaluator = task.create_evaluator()
    with Progress(title, len(loader)) as progress:
        for images, targets in loader:
            evaluator.update(model(images), targets)
            progress.update(top1=evaluator.summary()['top1'])
    return {**evaluator.compute(), 'images': int(evaluator.counts[0])}
