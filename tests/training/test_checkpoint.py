"""Checkpoints survive a kill, run nothing, and say what does not fit."""
import math
import pickle
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from training_helpers import Gadget

from ls_vision.training.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    atomic_write,
    load_checkpoint,
    load_latest,
    load_weights,
    save_checkpoint,
)
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
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST, PREVIOUS]


def test_failed_write_leaves_nothing_behind(tmp_path):
    def fail(file):
        raise OSError('disk full')

    with pytest.raises(UserError, match='file cannot be written: disk full; what was there before is whole'):
        atomic_write(tmp_path / 'file', fail)
    assert not list(tmp_path.iterdir())


def write_two(folder):
    for step in (1, 2):
        save_checkpoint(folder, dict(step=step, w=torch.arange(1000)), is_best=False)


def flip(content):
    return content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]


@pytest.mark.parametrize('damage', [flip, lambda content: content[:2000], lambda content: b''])
def test_damaged_last_checkpoint_is_noticed_and_the_one_before_read(tmp_path, damage):
    write_two(tmp_path)
    assert load_latest(tmp_path)['step'] == 2
    notes = []
    (tmp_path / LAST).write_bytes(damage((tmp_path / LAST).read_bytes()))
    assert load_latest(tmp_path, notes.append)['step'] == 1
    assert len(notes) == 1 and 'last.pth.tar' in notes[0] and 'previous.pth.tar' in notes[0]
    (tmp_path / PREVIOUS).write_bytes(damage((tmp_path / PREVIOUS).read_bytes()))
    with pytest.raises(UserError, match=r'last\.pth\.tar .*previous\.pth\.tar'):
        load_latest(tmp_path)


def test_kill_between_the_renames_leaves_the_previous_one(tmp_path):
    write_two(tmp_path)
    (tmp_path / LAST).unlink()
    assert load_latest(tmp_path)['step'] == 1
    assert load_latest(tmp_path / 'empty') is None


def test_file_with_its_checksum_is_one_that_others_read(tmp_path):
    write_two(tmp_path)
    assert torch.load(tmp_path / LAST, mmap=True)['step'] == 2
    with zipfile.ZipFile(tmp_path / LAST) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b'sha256:')


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    write_two(tmp_path)
    weights = dict(ok=torch.ones(2), bad=torch.tensor([1., math.nan]))
    for key in ('state_dict', 'state_dict_ema'):
        with pytest.raises(UserError, match=rf'{key}\.bad is not finite: no checkpoint was written'):
            save_checkpoint(tmp_path, {'step': 3, key: weights}, is_best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST, PREVIOUS]
    assert load_latest(tmp_path)['step'] == 2


FULL_DISK = '''
import sys
import torch
from pathlib import Path
from ls_vision.training.checkpoint import save_checkpoint
from ls_vision.training.errors import UserError

for step in range(9):
    try:
        save_checkpoint(Path(sys.argv[1]), dict(step=step, w=torch.zeros(step * 100_000)), is_best=False)
    except UserError as e:
        sys.exit(f'{step}: {e}')
'''


def test_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """On a real file system of one and a half megabytes, in a mount name space of its own."""
    command = (
        'mount -t tmpfs -o size=1500k tmpfs "$1" && "$2" -c "$3" "$1"; status=$?; cp "$1"/* "$4"; exit $status')
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'rescued').mkdir()
    result = subprocess.run(
        ['unshare', '--map-root-user', '--mount', 'sh', '-c', command, 'sh', tmp_path / 'disk', sys.executable,
         FULL_DISK, tmp_path / 'rescued'], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert 'last.pth.tar cannot be written: No space left on device; what was there before is whole' in result.stderr
    assert 'Traceback' not in result.stderr
    step = int(result.stderr.split(':')[0])
    assert load_latest(tmp_path / 'rescued')['step'] == step - 1
    assert sorted(p.name for p in (tmp_path / 'rescued').iterdir()) == [LAST, PREVIOUS]


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
