"""The training and the evaluation script with images that two real processes share, beside one process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_helpers import write_images

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the scripts lie beside the package, not in it
import eval_imagenet  # noqa: E402
import train_imagenet  # noqa: E402
from ls_vision.analysis import pictures  # noqa: E402


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, 'is_available', lambda: False)  # they take most of a tiny run's time


TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A linear ViL-LS of a few thousand parameters that may be cut at multiples of 64 rows, and images of 150 rows.

    With SGD: AdamW would enlarge the rounding of gradients that are zero.
    """
    folder = tmp_path_factory.mktemp('data')
    write_images(folder / 'train', 4)
    write_images(folder / 'val', 3, seed=1)
    values = dict(
        data_dir=str(folder), model='vil_ls_tiny_linear', img_size=150, batch_size=2, workers=0, opt='sgd', lr=.02,
        model_kwargs=dict(
            patch_size=4, embed_dims=[8, 16, 16, 16], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1], window_size=2,
            rank=3),
        sched='none', warmup_epochs=0, epochs=1, mixup=.8, reprob=.5, model_ema=True, model_ema_decay=.5, clip_grad=.5,
        grad_accum_steps=2, log_interval=1, device='cpu', output=str(folder / 'output'))
    path = folder / 'config.yaml'
    path.write_text(yaml.safe_dump(values))
    return path


def run_torchrun(script, *argv, processes=2):
    return subprocess.run(
        [*TORCHRUN, str(processes), ROOT / script, *map(str, argv)], capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, timeout=300)


def train_alone(config, experiment, *argv):
    train_imagenet.main(['--config', str(config), '--experiment', experiment, *map(str, argv)])


def train_together(config, experiment, *argv):
    result = run_torchrun(
        'train_imagenet.py', '--config', config, '--experiment', experiment, '--space-parallel', 2, *argv)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_same_run(config, first, second):
    """Weights, averages, losses and metrics are equal to rounding, and the checkpoints have the same keys."""
    a, b = (config.parent / 'output' / name for name in (first, second))
    one, two = (torch.load(path / 'last.pth.tar', weights_only=True) for path in (a, b))
    for name in ('state_dict', 'state_dict_ema'):
        assert list(one[name]) == list(two[name])
        for key, tensor in one[name].items():
            torch.testing.assert_close(two[name][key], tensor, rtol=1e-5, atol=1e-6)
    assert one['parameters'] == two['parameters'] and len(two['processes']) == 1
    assert (one['state_dict']['head.fc.weight'] - one['state_dict_ema']['head.fc.weight']).abs().max() > 1e-5
    logs = [[json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()] for path in (a, b)]
    assert len(logs[0]) == len(logs[1]) > 1
    for x, y in zip(*logs):
        assert x == pytest.approx(y, rel=1e-5)


def test_two_processes_train_as_one(config, one_thread):
    train_alone(config, 'one')
    said = train_together(config, 'two')
    assert 'Updates of 4 images' in said and 'Finished' in said
    assert_same_run(config, 'one', 'two')


@pytest.mark.slow
def test_batch_norms_train_as_one(config, one_thread):
    argv = ('--model', 'cvt_ls_13', '--model-kwargs', 'embed_dims=[8,16]', 'depths=[1,2]', 'num_heads=[1,2]', 'rank=3',
            'window_size=[8,4]', '--epochs', '2', '--no-aug')
    train_alone(config, 'one cvt', *argv)
    train_together(config, 'two cvt', *argv)
    assert_same_run(config, 'one cvt', 'two cvt')


@pytest.mark.parametrize('argv, message', [
    (['--space-parallel', '2'], '--space-parallel 2: there are 1 processes, expected a multiple of 2'),
    (['--space-parallel', '0'], '--space-parallel 0: must be 1 or more'),
    (['--space-parallel', '2', '--sync-bn'], '--sync-bn: not with --space-parallel 2'),
])
def test_wrong_input_is_one_line(config, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        train_alone(config, 'wrong', *argv)
    assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('argv, message', [
    (['--model', 'vil_ls_tiny', '--img-size', '128'],
     'error: --space-parallel 2: vil_ls_tiny has stages with full attention, in which every token needs all others; '
     'expected vil_ls_tiny_linear'),
    (['--img-size', '64'],
     "error: --space-parallel 2: An image of 64 rows can't be cut into 2 strips at multiples of 64 rows, expected at "
     'most 1'),
    (['--space-parallel', '3'], 'error: --space-parallel 3: there are 2 processes, expected a multiple of 3'),
])
def test_refused_before_training(config, argv, message):
    result = run_torchrun(
        'train_imagenet.py', '--config', config, '--experiment', 'refused', '--space-parallel', 2, *argv)
    assert result.returncode != 0 and message in result.stderr and 'Updates of' not in result.stdout


@pytest.mark.slow
def test_resume_with_another_number_of_strips(config, one_thread):
    train_alone(config, 'unbroken', '--epochs', 3)
    train_together(config, 'changing', '--epochs', 1)
    train_alone(config, 'changing', '--epochs', 2, '--resume', 'auto')
    assert 'space_parallel 1 -> 2' in train_together(config, 'changing', '--epochs', 3, '--resume', 'auto')
    assert_same_run(config, 'unbroken', 'changing')


@pytest.mark.slow
def test_two_images_on_two_processes_each(config):
    """The same batches, and losses, as two processes with whole images."""
    argv = ['--config', config, '--experiment']
    for name, processes, more in (('data', 2, []), ('both', 4, ['--space-parallel', 2])):
        result = run_torchrun('train_imagenet.py', *argv, name, *more, processes=processes)
        assert result.returncode == 0, result.stderr
    logs = [[json.loads(line) for line in (config.parent / 'output' / name / 'metrics.jsonl').read_text().splitlines()]
            for name in ('data', 'both')]
    for x, y in zip(*logs):
        assert x == pytest.approx(y, rel=1e-5)


@pytest.mark.slow
def test_same_augmentation_and_drops(config):
    """Ranks of one image draw alike, also after dropout in blocks, or `split_image` would refuse their batches."""
    train_together(
        config, 'drops', '--epochs', 2, '--drop-path', '.3', '--drop', '.2', '--reprob', '1', '--model-kwargs',
        'patch_size=4', 'embed_dims=[8,16,16,16]', 'num_heads=[1,2,2,2]', 'depths=[1,1,1,1]', 'window_size=2', 'rank=3',
        'proj_drop_rate=.2', '--batch-size', 4, '--train-crop-mode', 'rrc', '--aa', 'rand-m9-mstd0.5-inc1',
        '--workers', '1')


@pytest.mark.slow
def test_evaluation_gives_the_same_counts(config, tmp_path, one_thread):
    train_alone(config, 'evaluated')
    options = [
        '--data-dir', config.parent / 'val', '--model', 'vil_ls_tiny_linear', '--num-classes', 2, '--img-size', 150,
        '--checkpoint', config.parent / 'output' / 'evaluated' / 'last.pth.tar', '--batch-size', 4, '--workers', 0,
        '--device', 'cpu', '--model-kwargs', 'patch_size=4', 'embed_dims=[8,16,16,16]', 'num_heads=[1,2,2,2]',
        'depths=[1,1,1,1]', 'window_size=2', 'rank=3', '--results-file']
    eval_imagenet.main([*map(str, options), str(tmp_path / 'one.json')])
    result = run_torchrun('eval_imagenet.py', '--space-parallel', 2, *options, tmp_path / 'two.json')
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ('one.json', 'two.json'))
    assert one.pop('loss') == pytest.approx(two.pop('loss'), rel=1e-5)
    assert one == two and one['images'] == 6
