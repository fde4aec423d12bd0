"""Checkpoint files that are refused: nothing in them is run."""
import pickle

import pytest
import torch
from malicious import Gadget

from ls_vision.runtime.archives import load_checkpoint, write_checkpoint
from ls_vision.runtime.errors import UserError


@pytest.mark.parametrize('write', [
    lambda value, path: torch.save(dict(state_dict=value), path),
    lambda value, path: path.write_bytes(pickle.dumps(value)),
])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, write):
    write(Gadget(tmp_path / 'ran'), tmp_path / 'bad.pth')
    with pytest.raises(UserError, match=r'was refused.*Only plain tensors'):
        load_checkpoint(tmp_path / 'bad.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content', [b'', b'bad', b'not a checkpoint', b'PK\x03\x04 truncated'])
def test_damaged_file(tmp_path, content):
    (tmp_path / 'bad.pth').write_bytes(content)
    with pytest.raises(UserError, match=r'bad.pth (was refused|is damaged)'):
        load_checkpoint(tmp_path / 'bad.pth')


def test_truncated_file(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    with open(path, 'w+b') as file:
        write_checkpoint(dict(w=torch.zeros(10_000)), file)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match='is damaged'):
        load_checkpoint(path)


def test_missing_file_and_no_dictionary(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        load_checkpoint(tmp_path / 'nowhere.pth')
    torch.save(torch.zeros(2), tmp_path / 'tensor.pth')
    with pytest.raises(UserError, match='holds a Tensor'):
        load_checkpoint(tmp_path / 'tensor.pth')
