"""A run's checkpoints survive kills, full disks and damaged files."""
import math
import subprocess
import sys
import zipfile

import pytest
import torch

from ls_vision.runtime.archives import load_checkpoint
from ls_vision.runtime.errors import UserError
from ls_vision.training.checkpoint import BEST, LAST, PREVIOUS, load_latest, save_checkpoint


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
from ls_vision.runtime.errors import UserError

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
    assert 'last.pth.tar cannot be written: No space left on device; its previous content is unchanged' in result.stderr
    assert 'Traceback' not in result.stderr
    step = int(result.stderr.split(':')[0])
    assert load_latest(tmp_path / 'rescued')['step'] == step - 1
    assert sorted(p.name for p in (tmp_path / 'rescued').iterdir()) == [LAST, PREVIOUS]


def test_best_is_written_only_when_it_is(tmp_path):
    save_checkpoint(tmp_path, dict(epoch=0), is_best=True)
    save_checkpoint(tmp_path, dict(epoch=1), is_best=False)
    assert (load_checkpoint(tmp_path / LAST)['epoch'], load_checkpoint(tmp_path / BEST)['epoch']) == (1, 0)
