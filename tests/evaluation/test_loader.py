"""Evaluation batches do not depend on the number of processes."""
import pytest

from ls_vision.evaluation.loader import ShardedBatchSampler


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_shards_are_the_same_batches_dealt_out(world_size):
    shards = [list(ShardedBatchSampler(10, 3, rank, world_size)) for rank in range(world_size)]
    assert sorted(batch for shard in shards for batch in shard) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
