"""Checkpoints survive a kill, run nothing, and say what does not fit."""
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from training_helpers import Gadget

from ls_vision.training.checkpoint import BEST, LAST, atomic_write, load_checkpoint, load_weights, save_checkpoint
from ls_vision.training.errors import UserError

KILLED_WRITER = '''
import os, signal, sys
from pathlib import Path
from ls_vision.training.checkpoint import atomic_write

def write_half(file):
    file.write(b'x' * 1_000_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

atomic_write(Path(sys.argv[1]), write_half)
'''


def test_kill_in_the_middle_of_a_write_leaves_the_previous_file_whole(tmp_path):
    path = save_checkpoint(tmp_path, dict(state_dict=dict(w=torch.arange(3))), is_best=False)
    killed = subprocess.run([sys.executable, '-c', KILLED_WRITER, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert torch.equal(load_checkpoint(path)['state_dict']['w'], torch.arange(3))

    # What the kill left is no obstacle to the next write.
    save_checkpoint(tmp_path, dict(state_dict=dict(w=torch.arange(4))), is_best=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST]


def test_failed_write_leaves_nothing_behind(tmp_path):
    def fail(file):
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        atomic_write(tmp_path / 'file', fail)
    assert not list(tmp_path.iterdir())


def test_best_is_written_only_when_it_is(tmp_path):
    save_checkpoint(tmp_path, dict(epoch=0), is_best=True)
    save_checkpoint(tmp_path, dict(epoch=1), is_best=False)
    assert (load_checkpoint(tmp_path / LAST)['epoch'], load_checkpoint(tmp_path / BEST)['epoch']) == (1, 0)


@pytest.mark.parametrize('write', [
    lambda value, path: torch.save(dict(state_dict=value), path),
    lambda value, path: path.write_bytes(pickle.dumps(value)),
])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, write):
    write(Gadget(tmp_path / 'ran'), tmp_path / 'bad.pth')
    with pytest.raises(UserError, match=r'was refused.*Only plain tensors'):
        load_checkpoint(tmp_path / 'bad.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 truncated'])
def test_damaged_file(tmp_path, content):
    (tmp_path / 'bad.pth').write_bytes(content)
    with pytest.raises(UserError, match=r'bad.pth (was refused|is damaged)'):
        load_checkpoint(tmp_path / 'bad.pth')


def test_truncated_file(tmp_path):
    path = save_checkpoint(tmp_path, dict(w=torch.zeros(10_000)), is_best=False)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match='is damaged'):
        load_checkpoint(path)


def test_missing_file_and_no_dictionary(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        load_checkpoint(tmp_path / 'nowhere.pth')
    torch.save(torch.zeros(2), tmp_path / 'tensor.pth')
    with pytest.raises(UserError, match='holds a Tensor'):
        load_checkpoint(tmp_path / 'tensor.pth')


def test_weights_of_another_architecture_name_a_few_keys(tmp_path):
    torch.save(nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)]).state_dict(), tmp_path / 'w.pth')
    message = (
        r'does not fit Linear: 2 keys missing \(weight, bias\); '
        r'12 keys not known \(0.weight.*\.\.\.\)')
    with pytest.raises(UserError, match=message):
        load_weights(nn.Linear(2, 2), tmp_path / 'w.pth')
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'1 shapes differ \(weight \(2, 3\) instead of \(2, 2\)\)'):
        load_weights(nn.Linear(2, 2), tmp_path / 'w.pth')


def test_averaged_weights_are_preferred(tmp_path):
    plain, averaged = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(dict(state_dict=plain.state_dict(), state_dict_ema=averaged.state_dict()), tmp_path / 'w.pth')
    model = nn.Linear(2, 2)
    load_weights(model, tmp_path / 'w.pth')
    assert torch.equal(model.weight, averaged.weight)
