"""Which sample comes when, so that a run can be resumed in the middle of an epoch, bit for bit.

The order follows from the seed and the epoch alone, and the randomness of a sample (crop, flip, ...) or of a batch
(mixup) from its key alone: not from worker processes, nor from what they have read ahead. A resumed run starts its
samplers at the batch it had come to, and need not replay anything.
"""
import signal
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info

from .randomness import derive_seed, isolated, seed_cpu
from .signals import StopRequest


class Draw(NamedTuple):
    """A sample of an epoch: what the dataset is asked for, and the seed of what is random about it."""

    sample: int
    seed: int


class ResumableBatchSampler(Sampler[list[Draw]]):
    """Shuffled batches of one process, from any batch of any epoch on.

    Args:
        dataset: What is sampled; only its length counts.
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


class ShardedBatchSampler(Sampler[list[int]]):
    """Batches in order, dealt out to the processes whole.

    Every sample is seen once, in a batch of the same samples whatever the number of processes: so the model's output
    for it, and any figure computed from all outputs, is the same to the last bit.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1):
        starts = range(0, num_samples, batch_size)[rank::world_size]
        self.batches = [list(range(start, min(start + batch_size, num_samples))) for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class SeededDataset(Dataset[Any]):
    """Asks a dataset for a sample after seeding the generators for it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        with _leave_main_process_alone():
            seed_cpu(draw.seed)
            return self.dataset[draw.sample], draw.seed

    def __len__(self) -> int:
        return len(self.dataset)


class SeededCollate:
    """Makes a batch after seeding the generators for it, since collate functions may mix images."""

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
    """A training loader that `batch_sampler.set_position` places, and that takes nothing from the global generators."""
    return DataLoader(
        SeededDataset(dataset),
        batch_sampler=batch_sampler,
        collate_fn=SeededCollate(collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch's workers are seeded from the global one
        worker_init_fn=ignore_signals,
    )


def ignore_signals(worker: int) -> None:
    """Let a loader process outlive a signal sent to the whole group: the run still finishes its step."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_main_process_alone() -> Any:
    """Without worker processes the samples are made where the model draws its dropout: leave no trace there."""
    return isolated() if get_worker_info() is None else nullcontext()
