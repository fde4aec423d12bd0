"""One pass over the data: training and evaluation."""
import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from timm.utils import dispatch_clip_grad

from ..evaluation.predictions import accuracy, predict
from ..runtime.devices import autocast
from ..runtime.errors import UserError
from ..runtime.logs import ProgressBar, Stopwatch
from ..runtime.signals import StopRequest
from .faults import gradients_are_finite
from .state import TrainingState

Batch = tuple[Any, Any]  # what the task takes: images and targets


class BatchSource(Protocol):
    """Training batches from any batch of any epoch on."""

    @property
    def dataset(self) -> Any: ...

    def read(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


class Stopped(Exception):
    """A signal asked the run to stop. The state is that after a complete update."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


def train_one_epoch(
        state: TrainingState,
        loader: BatchSource,
        args: argparse.Namespace,
        title: str,
        watch: Stopwatch,
        stop: StopRequest,
        after_update: Callable[[float], None],
) -> None:
    """Train on the remaining batches of the epoch.

    Args:
        state: What is trained.
        loader: Training batches.
        args: The run's arguments.
        title: Name of the pass in the progress bar.
        watch: Takes the seconds of training and of waiting for data.
        stop: Asked after each update.
        after_update: Called with the loss after each update, e.g. to log and to save.

    Raises:
        Stopped: A signal has arrived.
        UserError: Too many losses in a row were not finite, or too many images cannot be read.
    """
    progress = state.progress
    state.task.train()
    batches = loader.read(progress.epoch, progress.batch)
    with ProgressBar(title, len(loader), args.log_interval, done=progress.batch) as display:
        while progress.batch < len(loader):
            with watch.measure('waiting for data'):
                group = list(islice(batches, min(args.grad_accum_steps, len(loader) - progress.batch)))
            if not group:
                break  # a stream that holds fewer images than announced
            with watch.measure('training'):
                loss, signal_number = update(state, group, args, title, stop.signal_number)
            progress.batch += len(group)
            _check_unreadable(state, loader.dataset, args)
            for _ in group:
                display.update(loss=state.loss_sum / max(1, state.num_images), lr=state.lr)
            after_update(loss)
            if signal_number:
                raise Stopped(signal_number)


def update(
        state: TrainingState,
        batches: list[Batch],
        args: argparse.Namespace,
        title: str,
        signal_number: int = 0,
) -> tuple[float, int]:
    """One update of the weights, their average and the learning rate, from one or several batches.

    Returns:
        Mean loss of the batches in this process, and the largest signal number of all processes.
    """
    task, progress = state.task, state.progress
    loss = _accumulate_gradients(state, batches, args)
    state.scaler.unscale_(state.optimizer)
    # A scaler handles overflowing gradients itself: it skips the step and lowers the scale.
    finite = math.isfinite(loss) and (state.scaler.is_enabled() or gradients_are_finite(task.get_clip_parameters()))
    not_finite, signal_number = map(int, state.processes.max(not finite, signal_number))
    if state.guard.accept(loss, not not_finite, f'update {progress.num_updates + 1} ({title})'):
        if args.clip_grad is not None:
            parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        state.scaler.step(state.optimizer)
        task.update_ema(step=progress.num_updates + 1)
        num_images = sum(len(images) for images, _ in batches)
        state.loss_sum += loss * num_images
        state.num_images += num_images
    state.scaler.update()
    state.optimizer.zero_grad()
    progress.num_updates += 1
    if state.scheduler is not None:
        state.scheduler.step_update(num_updates=state.schedule_position)
    return loss, signal_number


def evaluate(
        state: TrainingState,
        loader: Any,
        args: argparse.Namespace,
        stop: StopRequest | None = None,
        title: str = 'test',
) -> dict[str, float]:
    """Metrics of the averaged weights, or of the model where there is no average; see `accuracy`.

    Raises:
        Stopped: A signal has arrived.
    """
    def check() -> None:
        if stop is not None and stop.signal_number:
            raise Stopped(stop.signal_number)

    state.task.eval()
    state.processes.share_buffers(state.task.get_trainable_module(), state.task.get_trainable_module(ema=True))
    alone = state.processes.is_only  # other processes would wait for one that stops here
    return accuracy(predict(
        state.eval_model, loader, state.processes, title=title, after_batch=check if alone else lambda: None,
        autocast=partial(autocast, state.processes.device, args.amp, args.amp_dtype)))


def _accumulate_gradients(state: TrainingState, batches: list[Batch], args: argparse.Namespace) -> float:
    """Accumulate the gradients of the mean loss of the batches; processes synchronise once, at the last batch."""
    losses = []
    for i, (images, targets) in enumerate(batches):
        if getattr(args, 'channels_last', False):
            images = images.contiguous(memory_format=torch.channels_last)
        with state.task.no_sync() if i + 1 < len(batches) else nullcontext():
            with autocast(state.processes.device, args.amp, args.amp_dtype):
                loss = state.task(images, targets)['loss']
            state.scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def _check_unreadable(state: TrainingState, dataset: Any, args: argparse.Namespace) -> None:
    found = getattr(dataset, 'num_unreadable', 0)
    if found and found > args.max_unreadable * len(dataset):
        raise UserError(
            f'{found} of {len(dataset)} training images cannot be read, more than --max-unreadable '
            f'{args.max_unreadable:g} of them; e.g. {dataset.describe_unreadable()}')
