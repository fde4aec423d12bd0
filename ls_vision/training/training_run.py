"""A training run, from its checkpoint to its end."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..runtime.archives import load_checkpoint
from ..runtime.arguments import save_args
from ..runtime.errors import UserError
from ..runtime.locks import hold_folder
from ..runtime.logs import Stopwatch, say
from ..runtime.signals import StopRequest
from .checkpoint import LAST, load_latest, save_checkpoint
from .engine import BatchSource, Stopped, train_one_epoch
from .metrics import MetricLog
from .resume import restore
from .state import TrainingState

Metrics = dict[str, float]


class TrainingRun:
    """Trains a state on a loader's batches; all of its files are in one folder.

    Args:
        args: The script's arguments.
        state: What is trained.
        loader: Training batches.
        output: The run's folder; made when training starts.
        watch: Takes the seconds of each kind of work.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            state: TrainingState,
            loader: BatchSource,
            output: Path,
            watch: Stopwatch,
    ):
        self.args, self.state, self.loader, self.output, self.watch = args, state, loader, output, watch

    def resume(self) -> None:
        """Return to the checkpoint that --resume names, if any.

        Raises:
            UserError: The file cannot be read or does not fit.
        """
        args = self.args
        if not args.resume:
            return
        checkpoint = load_latest(self.output, say) if args.resume == 'auto' else load_checkpoint(args.resume)
        if checkpoint is None:
            say(f'{self.output} holds no checkpoint yet: the run starts from the beginning')
            return
        path = str(self.output / LAST) if args.resume == 'auto' else args.resume
        notes = restore(self.state, checkpoint, args, path)
        if len(self.state.unreadable):
            self.loader.dataset.mark_unreadable(self.state.unreadable)
        progress = self.state.progress
        say(f'Resuming from {path}: epoch {progress.epoch + 1}, batch {progress.batch}, update {progress.num_updates}')
        for note in notes:
            say(f'  {note}')

    def train(self, evaluate: Callable[[StopRequest], Metrics], describe: Callable[[Metrics], str]) -> None:
        """Train the remaining epochs, and evaluate, log and save after each.

        On SIGTERM, SIGHUP or Ctrl-C it saves and exits.

        Args:
            evaluate: Metrics of the state after an epoch; empty where it is not evaluated.
            describe: Those metrics as text.

        Raises:
            UserError: The run's folder cannot be written, or another run writes into it.
        """
        if not self.state.processes.is_primary:
            self._train(evaluate, describe, None)
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f'--output {self.args.output}: cannot be written: {e}') from e
        with hold_folder(self.output):
            log = self._open_log()
            try:
                self._train(evaluate, describe, log)
            finally:
                log.close()

    def _train(
            self,
            evaluate: Callable[[StopRequest], Metrics],
            describe: Callable[[Metrics], str],
            log: MetricLog | None,
    ) -> None:
        try:
            with StopRequest() as stop:
                while self.state.progress.epoch < self.state.num_epochs:
                    self._train_epoch(evaluate, describe, log, stop)
        except Stopped as e:
            self.save()
            say(f'Stopped by signal {e.signal_number} after update {self.state.progress.num_updates}; saved '
                f'{self.output / LAST}, continue with --resume auto')
            sys.exit(128 + e.signal_number)

    def save(self, is_best: bool = False) -> None:
        """Write the checkpoint. Every process must call it; the first one writes."""
        content = self.state.checkpoint(self.args, self._unreadable())
        if self.state.processes.is_primary:
            save_checkpoint(self.output, content, is_best)

    def _open_log(self) -> MetricLog:
        args, progress = self.args, self.state.progress
        save_args(args, self.output / 'args.yaml')
        wandb = dict(project=args.wandb_project, name=self.output.name, config=vars(args)) if args.log_wandb else None
        return MetricLog(self.output, progress.epoch, progress.num_updates, args.log_tensorboard, wandb)

    def _train_epoch(
            self,
            evaluate: Callable[[StopRequest], Metrics],
            describe: Callable[[Metrics], str],
            log: MetricLog | None,
            stop: StopRequest,
    ) -> None:
        args, state, progress = self.args, self.state, self.state.progress

        def after_update(loss: float) -> None:
            if log is not None and progress.num_updates % args.log_interval == 0:
                log.log_step(progress.epoch, progress.num_updates, loss=loss, lr=state.lr)
            if args.recovery_interval and progress.num_updates % args.recovery_interval == 0:
                self.save()

        title = f'epoch {progress.epoch + 1}/{state.num_epochs}'
        train_one_epoch(state, self.loader, args, title, self.watch, stop, after_update)
        with self.watch.measure('evaluation'):
            metrics = evaluate(stop)
        loss, skipped, unreadable = state.mean_loss(), state.guard.skipped, len(self._unreadable())
        if log is not None:
            log.log_epoch(
                progress.epoch, progress.num_updates,
                train_loss=loss, train_skipped=skipped, train_unreadable=unreadable,
                **{f'eval_{name}': value for name, value in metrics.items()}, lr=state.lr)
        is_best = state.end_epoch(metrics)
        self.save(is_best)
        say(', '.join([
            f'{title}: train loss {loss:.4f}',
            *([f'{skipped} steps skipped'] if skipped else []),
            *([f'{unreadable} training images unreadable'] if unreadable else []),
            *([describe(metrics)] if metrics else []),
        ]))

    def _unreadable(self) -> torch.Tensor:
        """Indices of the training images that could not be read, by any process."""
        mine = getattr(self.loader.dataset, 'unreadable', torch.zeros(0))
        return self.state.processes.sum(mine.long()).nonzero().flatten()
