"""Who is blamed for a wait in vain."""
import pytest

from ls_vision.parallel.watch import describe

WAITS = dict(waiting='head', calls=7)


@pytest.mark.parametrize('answers, clause', [
    ({1: None, 2: WAITS, 3: None}, "ranks 1, 3 died or can't be reached"),
    ({1: None, 2: dict(error='ValueError: x')}, 'rank 2 has failed with ValueError: x'),
    ({1: dict(waiting='', calls=7), 2: WAITS}, 'rank 1 hung, or took too long, outside of any exchange'),
    ({1: dict(waiting='maps', calls=5), 2: WAITS}, 'rank 1 waits for maps'),
    ({1: WAITS, 2: WAITS}, 'all ranks wait, and the messages between them are lost'),
])
def test_blame(answers, clause):
    assert describe(answers, calls=7) == clause
