"""A run that is stopped and resumed gives the same bits as an uninterrupted one."""
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import signal_when, write_images

import train_imagenet
from ls_vision.runtime.locks import hold_folder

SCRIPT = Path(train_imagenet.__file__)
EVERYTHING_RANDOM = (  # in the loader's processes, on the batch, and in the model
    '--mixup', '.8', '--cutmix', '1', '--aa', 'rand-m5-mstd0.5-inc1', '--reprob', '.25', '--drop', '.1',
    '--drop-path', '.2', '--model-ema', '--model-ema-decay', '.9', '--clip-grad', '1', '--recovery-interval', '2',
    '--log-interval', '1', '--deterministic', '--resume', 'auto',
)
EVERYTHING_RANDOM_KWARGS = ('--opt', 'adamw', '--warmup-epochs', '1')


@pytest.fixture
def arguments(config, tmp_path):
    """Arguments of a run of 6 updates per epoch whose every part draws random numbers."""
    write_images(tmp_path / 'more' / 'train', 24)
    write_images(tmp_path / 'more' / 'val', 4, seed=1)
    return ['--config', str(config), '--data-dir', str(tmp_path / 'more'), *EVERYTHING_RANDOM,
            *EVERYTHING_RANDOM_KWARGS]


def assert_same_outcome(first: Path, second: Path) -> None:
    for name in ('summary.csv', 'metrics.jsonl'):
        assert (first / name).read_text() == (second / name).read_text()
    one, other = (torch.load(folder / 'last.pth.tar') for folder in (first, second))
    for key in ('state_dict', 'state_dict_ema'):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
    for name in ('progress', 'guard', 'scheduler'):
        assert one[name] == other[name]
    assert all(torch.equal(a['random']['torch'], b['random']['torch'])
               for a, b in zip(one['processes'], other['processes'], strict=True))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_within_the_epoch_and_the_run_goes_on(arguments, tmp_path, capsys, number):
    arguments += ['--epochs', '2', '--workers', '0']
    unbroken = train_imagenet.main([*arguments, '--experiment', 'unbroken'])['output']
    stopped = tmp_path / 'output' / 'stopped'
    signal_when(stopped / 'metrics.jsonl', 3, number)
    with pytest.raises(SystemExit) as stop:
        train_imagenet.main([*arguments, '--experiment', 'stopped'])
    assert stop.value.code == 128 + number
    assert f'Stopped by signal {int(number)} after update' in capsys.readouterr().out
    assert train_imagenet.main([*arguments, '--experiment', 'stopped'])['output'] == stopped
    assert 'Resuming from' in capsys.readouterr().out
    assert_same_outcome(unbroken, stopped)


def test_finished_run_is_not_trained_again(arguments, capsys):
    first = train_imagenet.main([*arguments, '--epochs', '1'])
    before = (first['output'] / 'last.pth.tar').read_bytes()
    assert train_imagenet.main([*arguments, '--epochs', '1']) == first
    assert (first['output'] / 'last.pth.tar').read_bytes() == before


def test_second_run_in_the_same_folder_is_refused(arguments, tmp_path):
    (tmp_path / 'output' / 'run').mkdir(parents=True)
    with hold_folder(tmp_path / 'output' / 'run'), pytest.raises(SystemExit, match='run is being written by another'):
        train_imagenet.main([*arguments, '--epochs', '1'])
    assert not list((tmp_path / 'output' / 'run').iterdir())


def test_damaged_last_checkpoint_costs_only_what_came_after_the_one_before(arguments, capsys):
    unbroken = train_imagenet.main([*arguments, '--epochs', '2', '--experiment', 'unbroken'])['output']
    damaged = train_imagenet.main([*arguments, '--epochs', '2', '--experiment', 'damaged'])['output']
    content = (damaged / 'last.pth.tar').read_bytes()
    (damaged / 'last.pth.tar').write_bytes(content[:len(content) // 2])
    capsys.readouterr()
    train_imagenet.main([*arguments, '--epochs', '2', '--experiment', 'damaged'])
    assert 'last.pth.tar is damaged' in capsys.readouterr().out
    assert_same_outcome(unbroken, damaged)


def test_other_batches_in_the_middle_of_an_epoch_are_refused(arguments, tmp_path):
    signal_when(tmp_path / 'output' / 'run' / 'metrics.jsonl', 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train_imagenet.main([*arguments, '--epochs', '1'])
    with pytest.raises(SystemExit, match=r'middle of an epoch with .*batch_size 8.* this run has .*batch_size 4'):
        train_imagenet.main([*arguments, '--epochs', '1', '--batch-size', '4'])


def test_checkpoint_of_weights_alone_is_refused(arguments, tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    with pytest.raises(SystemExit, match="lacks 'progress'; to start from weights alone, use --initial-checkpoint"):
        train_imagenet.main([*arguments, '--resume', str(tmp_path / 'weights.pth')])


def count_rows(path: Path) -> int:
    return path.read_text().count('\n') if path.exists() else 0


def descendants(number: int) -> list[int]:
    """A process and all its descendants, on Linux and macOS."""
    listing = subprocess.run(['ps', '-A', '-o', 'pid=,ppid='], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [number]
    for parent in found:  # grows as it goes
        found += [child for child, of in parents if of == parent]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('num_processes', [1, 2])
def test_five_kills_at_random_moments(arguments, tmp_path, num_processes):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'] if num_processes == 2 else []
    command = [sys.executable, *launcher, str(SCRIPT), *arguments, '--epochs', '12', '--workers', '1']
    seed = random.SystemRandom().randrange(1000)
    rng = random.Random(seed)
    print(f'kills drawn from seed {seed}')  # shown where the test fails
    subprocess.run([*command, '--experiment', 'unbroken'], check=True, capture_output=True, timeout=400)
    output = tmp_path / 'output' / 'killed'
    lines_per_epoch = 6 // num_processes + 1
    for kill in range(5):
        process = subprocess.Popen(
            [*command, '--experiment', 'killed'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = 2 * lines_per_epoch * kill + rng.randrange(1, 2 * lines_per_epoch)
        while count_rows(output / 'metrics.jsonl') < moment:
            assert process.poll() is None
            time.sleep(.01)
        time.sleep(rng.random() / 2)
        for number in descendants(process.pid):  # torchrun's processes would outlive it
            with contextlib.suppress(ProcessLookupError):  # gone since it was listed
                os.kill(number, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, '--experiment', 'killed'], check=True, capture_output=True, timeout=400)
    assert_same_outcome(tmp_path / 'output' / 'unbroken', output)
