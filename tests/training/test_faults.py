"""The guard against non-finite losses."""
import math

import pytest
import torch

from ls_vision.runtime.errors import UserError
from ls_vision.training.faults import FiniteGuard, gradients_are_finite


def test_guard_counts_and_gives_up():
    guard = FiniteGuard(patience=3)
    assert [guard.accept(1., finite, 'update 1') for finite in (True, False, False, True, False)] == [
        True, False, False, True, False]
    assert guard.state_dict() == dict(skipped=3, in_a_row=1)
    guard.accept(1., False, 'update 2')
    with pytest.raises(UserError, match='loss nan at update 3: 3 steps in a row were skipped, 5 in total'):
        guard.accept(math.nan, False, 'update 3')


@pytest.mark.parametrize('value, finite', [(1., True), (math.nan, False), (math.inf, False)])
def test_gradients(value, finite):
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.tensor([1., value, 0.])
    assert gradients_are_finite([weight, torch.zeros(2, requires_grad=True)]) is finite
