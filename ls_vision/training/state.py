"""The state of a training run, and its form in a checkpoint."""
import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..runtime import randomness
from ..runtime.processes import Processes
from .faults import FiniteGuard


@dataclass
class Progress:
    """Position of the run; plain values, the same in every process."""

    epoch: int = 0  # the current one
    batch: int = 0  # batches of it that are done
    num_updates: int = 0  # in total
    best_metric: float = -1.
    metrics: dict[str, float] = field(default_factory=dict)  # of the last complete epoch
    schedule_shift: int = 0  # by how much the schedule is ahead of the updates, where the length of epochs changed


@dataclass
class TrainingState:
    """Model, optimiser, schedule and position of the run."""

    task: TrainingTask  # model, criterion and averaged weights
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler
    guard: FiniteGuard
    processes: Processes
    num_epochs: int
    updates_per_epoch: int
    metric: str = 'top1'  # selects the best checkpoint
    class_names: list[str] | None = None  # in the order of their numbers; None where the dataset does not know
    data: dict[str, Any] = field(default_factory=dict)  # what a checkpoint knows of the training data
    unreadable: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # found before a resume
    progress: Progress = field(default_factory=Progress)
    loss_sum: float = 0.  # over this process's images of the epoch
    num_images: int = 0

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate, without its distributed wrapper: the averaged one where there is one."""
        model = self.task.get_eval_model(ema=self.task.has_ema())
        assert model is not None
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def schedule_position(self) -> int:
        """Updates so far, as the schedule counts them."""
        return self.progress.num_updates + self.progress.schedule_shift

    def mean_loss(self) -> float:
        """Mean training loss of the epoch so far, over all processes."""
        total, count = self.processes.sum(torch.tensor([self.loss_sum, self.num_images], dtype=torch.float64)).tolist()
        return total / max(1, count)

    def end_epoch(self, metrics: dict[str, float]) -> bool:
        """Move on to the next epoch, given the metrics of this one; returns whether they are the best so far."""
        progress, value = self.progress, metrics.get(self.metric)
        if self.scheduler is not None:
            self.scheduler.step(progress.epoch + 1, value)
        is_best = value is not None and value >= progress.best_metric
        progress.metrics = metrics
        progress.best_metric = max(progress.best_metric, -1. if value is None else value)
        progress.epoch += 1
        progress.batch = 0
        self.loss_sum, self.num_images = 0., 0
        return is_best

    def checkpoint(self, args: argparse.Namespace, unreadable: torch.Tensor) -> dict[str, Any]:
        """The content of a checkpoint: tensors and plain values, with timm's keys. Every process must call it.

        Args:
            args: The run's arguments.
            unreadable: Indices of the images that could not be read.
        """
        mine = dict(random=randomness.capture(), loss_sum=self.loss_sum, num_images=self.num_images)
        return dict(
            arch=args.model,
            args=vars(args),
            epoch=self.progress.epoch - 1,
            metric=self.progress.metrics.get(self.metric),
            version=2,  # timm: `epoch` is the one that was completed
            optimizer=self.optimizer.state_dict(),
            amp_scaler=self.scaler.state_dict(),
            scheduler=_schedule_state(self.scheduler),
            parameters=parameter_names(self),
            updates_per_epoch=self.updates_per_epoch,
            class_names=self.class_names,
            data=self.data,
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            progress=vars(self.progress),
            guard=self.guard.state_dict(),
            unreadable=unreadable,
            processes=self.processes.gather(mine),
            sizes=batch_sizes(args),
        )


def batch_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """What decides which samples make a batch."""
    names = ('batch_size', 'grad_accum_steps', 'aug_repeats', 'crops_per_image', 'seed')  # not every script has all
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def parameter_names(state: TrainingState) -> list[str]:
    """Names of the optimiser's parameters, in its order."""
    model = unwrap_model(state.task.get_trainable_module())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in state.optimizer.param_groups for p in group['params']]


def _schedule_state(scheduler: Scheduler | None) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    state = scheduler.state_dict()
    if isinstance(scheduler, PlateauLRScheduler):  # timm leaves out the counters
        counters = scheduler.lr_scheduler
        state.update(num_bad_epochs=counters.num_bad_epochs, cooldown_counter=counters.cooldown_counter)
    return state
