"""Samples and their randomness depend on their place in the run alone."""
import random

import numpy as np
import pytest
import torch

from ls_vision.runtime.randomness import capture, restore
from ls_vision.training.sampling import Draw, ResumableBatchSampler, create_resumable_loader


class Noise(torch.utils.data.Dataset):
    """A sample is its index and a draw from each generator."""

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()

    def __len__(self):
        return 22


def mix(samples):
    return np.random.rand(), samples


def read(workers, epoch=0, first_batch=0, **kwargs):
    sampler = ResumableBatchSampler(Noise(), batch_size=4, seed=3, **kwargs)
    loader = create_resumable_loader(Noise(), sampler, mix, num_workers=workers)
    sampler.set_position(epoch, first_batch)
    return list(loader)


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_epoch_is_the_rest_of_the_whole_one(workers):
    assert read(workers, epoch=1, first_batch=2) == read(0, epoch=1)[2:]


def test_epochs_and_ranks_differ():
    whole = read(0)
    assert len(whole) == 5 and whole != read(0, epoch=1)
    first, second = (read(0, rank=rank, world_size=2, drop_last=False) for rank in (0, 1))
    indices = [index for batch in (*first, *second) for index, *_ in batch[1]]
    assert sorted(indices) == list(range(22))


def test_repeated_augmentation_draws_different_versions():
    samples = [sample for _, batch in read(0, num_repeats=2) for sample in batch]
    assert len({index for index, *_ in samples}) < len(samples) == len(set(samples))


def test_loader_leaves_the_global_generators_alone():
    before = capture()
    expected = random.random(), np.random.rand(), torch.rand(2).tolist()
    restore(before)
    read(0)
    read(2)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_length_is_that_of_a_whole_epoch():
    sampler = ResumableBatchSampler(Noise(), batch_size=4, seed=0)
    sampler.set_position(0, 3)
    assert len(sampler) == 5 and len(list(sampler)) == 2
    assert all(isinstance(draw, Draw) for batch in sampler for draw in batch)
