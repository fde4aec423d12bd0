"""Devices that cannot be used, and errors that say that memory ran out."""
import pytest
import torch

from ls_vision.runtime.devices import autocast, check_device, is_out_of_memory
from ls_vision.runtime.errors import UserError


def test_device():
    check_device('cpu')
    with pytest.raises(UserError, match='--device abacus cannot be used: '):
        check_device('abacus')


def test_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 60)
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError()) and is_out_of_memory(
        torch.OutOfMemoryError('CUDA out of memory'))
    assert not is_out_of_memory(RuntimeError('shapes differ')) and not is_out_of_memory(UserError('out of memory'))


@pytest.mark.parametrize('amp, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast(amp, dtype):
    with autocast(torch.device('cpu'), amp, 'bfloat16'):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
