"""The order of samples and their random numbers, such that a run resumes within an epoch bit for bit.

The order depends only on the seed and the epoch. The randomness of a sample (crop, flip, ...) or of a batch (mixup)
depends only on its key, not on worker processes or on what they have read ahead. A resumed run starts its samplers at
its next batch and replays nothing.
"""
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info

from ..runtime.randomness import derive_seed, isolated, seed_cpu
from ..runtime.signals import ignore_stop_signals


class Draw(NamedTuple):
    """A sample of an epoch: its index in the dataset, and the seed of its random numbers."""

    sample: int
    seed: int


class ResumableBatchSampler(Sampler[list[Draw]]):
    """Shuffled batches of one process, starting at any batch of any epoch.

    Args:
        dataset: The dataset; only its length is used.
        batch_size: Samples in a batch.
        seed: The run's seed.
        rank: This process.
        world_size: Number of processes; each takes its own part of an epoch.
        num_repeats: Augmented versions of each sample in an epoch (repeated augmentation); 0 for none.
        drop_last: Leave out an incomplete last batch.
    """

    def __init__(
            self,
            dataset: Sized,
            batch_size: int,
            seed: int,
            rank: int = 0,
            world_size: int = 1,
            num_repeats: float = 0,
            drop_last: bool = True,
    ):
        self.batch_size, self.seed, self.rank, self.drop_last = batch_size, seed, rank, drop_last
        self.epoch, self.first_batch = 0, 0
        self.indices: Any
        if num_repeats:
            self.indices = RepeatAugSampler(dataset, world_size, rank, num_repeats=num_repeats)
        else:
            self.indices = DistributedSampler(dataset, world_size, rank, seed=seed)  # type: ignore[arg-type]

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration start at this batch of this epoch."""
        self.epoch, self.first_batch = epoch, first_batch
        self.indices.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        indices = list(self.indices)
        for batch in range(self.first_batch, len(self)):
            positions = range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(indices)))
            yield [Draw(indices[i], derive_seed(self.seed, self.epoch, self.rank, i)) for i in positions]

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        count = len(self.indices)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)


class SeededDataset(Dataset[Any]):
    """Seeds the generators for each sample before it is read."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        with _leave_main_process_alone():
            seed_cpu(draw.seed)
            return self.dataset[draw.sample], draw.seed

    def __len__(self) -> int:
        return len(self.dataset)


class SeededCollate:
    """Seeds the generators for each batch, since collate functions may mix images."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, samples: list[tuple[Any, int]]) -> Any:
        with _leave_main_process_alone():
            seed_cpu(samples[0][1] + 1)
            return self.collate([sample for sample, _ in samples])


def create_resumable_loader(
        dataset: Any,
        batch_sampler: ResumableBatchSampler,
        collate: Callable[[list[Any]], Any],
        num_workers: int,
        pin_memory: bool = False,
) -> DataLoader[Any]:
    """A training loader that `batch_sampler.set_position` moves; it never draws from the global generators."""
    return DataLoader(
        SeededDataset(dataset),
        batch_sampler=batch_sampler,
        collate_fn=SeededCollate(collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise the workers are seeded from the global one
        worker_init_fn=ignore_stop_signals,
    )


def _leave_main_process_alone() -> Any:
    """Restore the generators where samples are made in the main process, which draws the model's dropout."""
    return isolated() if get_worker_info() is None else nullcontext()
