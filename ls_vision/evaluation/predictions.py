"""Predictions for every image of a dataset, by one process or several, and their accuracy."""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import UNREADABLE
from ..runtime.logs import ProgressBar
from ..runtime.processes import Processes
from .loader import ShardedBatchSampler

TOP = 5
NO_CLASS = UNREADABLE - 1  # neither a class nor a target


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, in the dataset's order, on the CPU.

    Attributes:
        top: (N, 5) best classes, the best first; -2 where an image could not be read or there are fewer classes.
        targets: (N,) classes; -1 where an image could not be read.
        losses: (N,) cross-entropies, 0 where an image could not be read.
    """

    top: Tensor
    targets: Tensor
    losses: Tensor

    @property
    def num_unreadable(self) -> int:
        return int((self.targets == UNREADABLE).sum())


@torch.inference_mode()
def predict(
        model: nn.Module,
        loader: Any,
        processes: Processes,
        classes: Tensor | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        title: str = 'test',
        after_batch: Callable[[], Any] = lambda: None,
) -> Predictions:
    """Run a model over a dataset. Every process gets all predictions.

    Args:
        model: A classifier.
        loader: Batches of this process, on the device.
        processes: The processes that share the work.
        classes: The columns of the logits to use, for a dataset of fewer classes; targets are indices into these.
        autocast: Context of the forward pass.
        title: Name of the pass in the progress bar.
        after_batch: Called after each batch, e.g. to stop.
    """
    model.eval()
    rows = []
    right = seen = 0
    with ProgressBar(title, len(loader)) as progress:
        for images, targets in loader:
            with autocast():
                logits = model(images)
            logits = logits.float() if classes is None else logits.float()[:, classes.to(logits.device)]
            row = _row(logits, targets)
            rows.append(row)
            right, seen = right + int((row[:, 0] == row[:, TOP]).sum()), seen + len(row)
            progress.update(top1=100 * right / seen)
            after_batch()
    found = torch.cat(rows) if rows else torch.empty(0, TOP + 2, dtype=torch.float64)
    found = _in_order(found, loader, processes)
    top, targets = found[:, :TOP].long(), found[:, TOP].long()
    top[targets == UNREADABLE] = NO_CLASS
    return Predictions(top, targets, found[:, TOP + 1])


def accuracy(predictions: Predictions) -> dict[str, float]:
    """Top-1 and top-5 in percent over all images, unreadable ones counted as wrong; mean loss of readable ones.

    Returns:
        `loss`, `top1`, `top5`, and `images` and `unreadable`, the counts behind them.
    """
    images, unreadable = len(predictions.targets), predictions.num_unreadable
    right = predictions.top == predictions.targets[:, None]
    return dict(
        loss=float(predictions.losses.sum()) / max(1, images - unreadable),
        top1=100 * int(right[:, 0].sum()) / max(1, images),
        top5=100 * int(right.any(1).sum()) / max(1, images),
        images=images,
        unreadable=unreadable,
    )


def _row(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, 7): best classes, target, loss; as 64-bit floats, which hold all of them exactly."""
    top = logits.topk(min(TOP, logits.shape[1])).indices
    top = F.pad(top, (0, TOP - top.shape[1]), value=NO_CLASS)
    losses = F.cross_entropy(logits, targets, reduction='none', ignore_index=UNREADABLE)
    return torch.cat([top.double(), targets[:, None].double(), losses[:, None].double()], dim=1).cpu()


def _in_order(rows: Tensor, loader: Any, processes: Processes) -> Tensor:
    """The rows of all processes, in the dataset's order where it has one."""
    if not isinstance(loader.batch_sampler, ShardedBatchSampler):
        return torch.cat(processes.gather(rows))
    everything = torch.zeros(len(loader.dataset), rows.shape[1], dtype=rows.dtype)
    everything[[index for batch in loader.batch_sampler for index in batch]] = rows
    return processes.sum(everything)  # all other processes hold zeros there, so the sum is exact
