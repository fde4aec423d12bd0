"""What changes while a run trains, and what of it a checkpoint holds."""
import argparse
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn


@dataclass
class TrainingState:
    """Model, optimiser and schedule, and how far the run has come."""

    task: TrainingTask  # model, criterion and averaged weights
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    num_epochs: int
    epoch: int = 0
    num_updates: int = 0
    best_top1: float = -1.

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the average of the weights where there is one."""
        return unwrap_model(self.task.get_eval_model(ema=self.task.has_ema()))

    def checkpoint(self, args: argparse.Namespace, metrics: dict[str, float]) -> dict[str, Any]:
        """The content of a checkpoint, under timm's keys: tensors and plain values only."""
        return dict(
            arch=args.model,
            args=vars(args),
            epoch=self.epoch,
            metric=metrics['top1'],
            version=2,  # timm: `epoch` is the one that was completed
            optimizer=self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
        )
