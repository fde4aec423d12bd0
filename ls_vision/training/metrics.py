"""Logs of a run: one CSV row per epoch, one JSON line per logged step, and optionally TensorBoard or W&B.

A resumed run first drops what was logged after its checkpoint, so its files equal those of an uninterrupted run.
"""
import csv
import io
import json
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, first_line
from ..runtime.files import write_text


class MetricLog:
    """Writes the metrics of a run.

    Args:
        folder: The run's folder.
        epoch: First epoch that will be logged; rows of this and later epochs are dropped.
        num_updates: Updates so far; lines of later ones are dropped.
        tensorboard: Write TensorBoard events as well.
        wandb: Arguments of `wandb.init`, to log to Weights & Biases as well.
    """

    def __init__(
            self,
            folder: Path,
            epoch: int = 0,
            num_updates: int = 0,
            tensorboard: bool = False,
            wandb: dict[str, Any] | None = None,
    ):
        self.csv_path = folder / 'summary.csv'
        self.json_path = folder / 'metrics.jsonl'
        self.rows = [row for row in _read_csv(self.csv_path) if int(row['epoch']) < epoch]
        lines = [
            line for line in _read_json_lines(self.json_path)
            if line['epoch'] < epoch or ('update' in line and line['update'] <= num_updates)]
        self._write_csv()
        write_text(self.json_path, ''.join(map(_json_line, lines)))
        self.tensorboard = _open_tensorboard(folder, num_updates) if tensorboard else None
        self.wandb = _open_wandb(folder, wandb) if wandb is not None else None

    def log_step(self, epoch: int, update: int, **figures: float) -> None:
        """Log one update as a line of JSON."""
        self._append(dict(epoch=epoch, update=update, **figures), update)

    def log_epoch(self, epoch: int, update: int, **figures: float) -> None:
        """Log an epoch as a row of the CSV file and a line of JSON without an update number."""
        self.rows.append({name: str(value) for name, value in dict(epoch=epoch, **figures).items()})
        self._write_csv()
        self._append(dict(epoch=epoch, **figures), update)

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _append(self, line: dict[str, float], update: int) -> None:
        try:
            with open(self.json_path, 'a', encoding='utf-8') as file:
                file.write(_json_line(line))
        except OSError as e:
            raise UserError(f'{self.json_path} cannot be written: {e.strerror}') from e
        if self.tensorboard is not None:
            for name in line.keys() - {'epoch', 'update'}:
                self.tensorboard.add_scalar(name, line[name], update)
        if self.wandb is not None:
            self.wandb.log(line, step=update)

    def _write_csv(self) -> None:
        text = io.StringIO()
        if self.rows:
            names = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(text, names, lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)
        write_text(self.csv_path, text.getvalue())


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that a kill has truncated."""
    lines = []
    for text in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line) + '\n'


def _open_tensorboard(folder: Path, num_updates: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError('--log-tensorboard needs tensorboard: pip install tensorboard') from e
    return SummaryWriter(str(folder), purge_step=num_updates + 1)


def _open_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise UserError('--log-wandb needs wandb: pip install wandb') from e
    try:
        return wandb.init(dir=str(folder), resume='allow', **settings)
    except Exception as e:  # errors of the network or the account
        raise UserError(f'--log-wandb: {first_line(e)}') from e
