"""Evaluation batches of one process or several."""
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..runtime.processes import Processes
from ..runtime.signals import ignore_stop_signals


class ShardedBatchSampler(Sampler[list[int]]):
    """Batches in order, each given to one process.

    Every sample is seen once, and its batch does not depend on the number of processes. The model's outputs, and any
    metric computed from them, are therefore bit-identical for any number of processes.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1):
        starts = range(0, num_samples, batch_size)[rank::world_size]
        self.batches = [list(range(start, min(start + batch_size, num_samples))) for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def create_eval_loader(
        dataset: Any,
        batch_size: int,
        workers: int,
        data_config: dict[str, Any],
        processes: Processes,
) -> Any:
    """This process's batches of an evaluation; an unreadable image becomes a black one with target -1."""
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        persistent_workers=False,
        **shared_options(dataset, workers, data_config, processes.device),
    )
    generator = torch.Generator()  # otherwise each pass would draw from the global one
    if isinstance(loader.dataset, IterableDataset):
        loader.loader.generator = generator
    else:
        inner = loader.loader
        sampler = ShardedBatchSampler(len(loader.dataset), batch_size, processes.rank, processes.world_size)
        loader.loader = DataLoader(
            loader.dataset, batch_sampler=sampler, collate_fn=inner.collate_fn, num_workers=workers,
            pin_memory=inner.pin_memory, generator=generator, worker_init_fn=ignore_stop_signals)
    return loader


def shared_options(dataset: Any, workers: int, data_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of timm's `create_loader` that training and evaluation have in common."""
    if isinstance(dataset, IterableDataset):
        workers = max(1, workers)  # in the main process they would share the generators of the model
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        device=device,
    )
