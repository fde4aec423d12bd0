"""The state of a training run, and its form in a checkpoint."""
import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..runtime import randomness
from ..runtime.errors import UserError, first_line
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
    metric: str = 'top1'  # selects the best checkpoint
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
            scheduler=self.scheduler.state_dict() if self.scheduler is not None else None,
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            progress=vars(self.progress),
            guard=self.guard.state_dict(),
            unreadable=unreadable,
            processes=self.processes.gather(mine),
            sizes=_sizes(args),
        )

    def load(self, checkpoint: dict[str, Any], args: argparse.Namespace, path: str) -> torch.Tensor:
        """Return to the state in which a checkpoint was written.

        Returns:
            Indices of the images that could not be read.

        Raises:
            UserError: The checkpoint is of another model or program, or was written within an epoch with other batches.
        """
        try:
            progress, processes = Progress(**checkpoint['progress']), checkpoint['processes']
            self._check_sizes(checkpoint['sizes'], len(processes), progress, args, path)
            self.task.load_checkpoint_state(checkpoint['state_dict'])
            if self.task.has_ema():
                self.task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            self.scaler.load_state_dict(checkpoint['amp_scaler'])
            if self.scheduler is not None and checkpoint['scheduler'] is not None:
                self.scheduler.load_state_dict(checkpoint['scheduler'])
            self.guard.load_state_dict(checkpoint['guard'])
            unreadable = checkpoint['unreadable']
        except KeyError as e:
            raise UserError(
                f'--resume {path}: it lacks {e}; to start from weights alone, use --initial-checkpoint') from e
        except (RuntimeError, ValueError, TypeError) as e:
            raise UserError(f'--resume {path} does not fit {args.model} and its optimiser: {first_line(e)}') from e
        self.progress = progress
        if len(processes) == self.processes.world_size:
            mine = processes[self.processes.rank]
            randomness.restore(mine['random'])
            self.loss_sum, self.num_images = mine['loss_sum'], mine['num_images']
        return unreadable

    def _check_sizes(
            self, found: dict[str, Any], num_processes: int, progress: Progress, args: argparse.Namespace, path: str,
    ) -> None:
        """Within an epoch the position is a number of batches, so the batches must be the same."""
        found, given = {'processes': num_processes, **found}, {'processes': self.processes.world_size, **_sizes(args)}
        if progress.batch and found != given:
            raise UserError(
                f'--resume {path} was written in the middle of an epoch with {_text(found)}, this run has '
                f'{_text(given)}: resume with the same')


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    names = ('batch_size', 'grad_accum_steps', 'aug_repeats', 'crops_per_image', 'seed')  # not every script has all
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _text(sizes: dict[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in sizes.items())
