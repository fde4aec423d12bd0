"""Runs with several processes, other number formats and other sources of images, and their errors."""
import csv
import math
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from training_helpers import signal_when, write_images

import train_imagenet
from ls_vision.training.checkpoint import load_latest

SCRIPT = Path(train_imagenet.__file__)


def run(config, *argv):
    return train_imagenet.main(['--config', str(config), *map(str, argv)])


def weights(result):
    return torch.load(result['output'] / 'last.pth.tar')['state_dict']


def summary(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_accumulated_batches_make_the_update_of_one_large_batch(config):
    whole = weights(run(config, '--batch-size', 8, '--experiment', 'whole', '--opt', 'sgd', '--lr', '.1'))
    parts = weights(run(config, '--batch-size', 4, '--grad-accum-steps', 2, '--experiment', 'parts', '--opt', 'sgd',
                        '--lr', '.1'))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6)


def test_last_update_of_an_epoch_takes_the_batches_that_are_left(config):
    result = run(config, '--batch-size', 4, '--grad-accum-steps', 3, '--epochs', 1)
    assert torch.load(result['output'] / 'last.pth.tar')['progress']['num_updates'] == 2  # 4 batches


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision(config, dtype):
    result = run(config, '--amp', '--amp-dtype', dtype, '--epochs', 1)
    assert all(weight.dtype == torch.float32 for weight in weights(result).values())
    scaler = torch.load(result['output'] / 'last.pth.tar')['amp_scaler']
    assert bool(scaler) == (dtype == 'float16')


def test_gradient_checkpointing_changes_nothing(config):
    plain = weights(run(config, '--epochs', 1, '--experiment', 'plain'))
    spared = weights(run(config, '--epochs', 1, '--experiment', 'spared', '--grad-checkpointing'))
    for name, weight in plain.items():
        torch.testing.assert_close(spared[name], weight, rtol=1e-5, atol=1e-7)


def test_compiled_model_is_trained_and_saved_under_plain_names(config):
    result = run(config, '--epochs', 1, '--torchcompile', 'eager', '--model-ema')
    assert 'head.fc.weight' in weights(result)
    assert 'head.fc.weight' in torch.load(result['output'] / 'last.pth.tar')['state_dict_ema']


def test_compiled_and_plain_runs_go_on_from_each_other(config):
    for epochs, extra in ((1, ['--torchcompile', 'eager']), (2, []), (3, ['--torchcompile', 'eager'])):
        result = run(config, '--epochs', epochs, '--model-ema', '--resume', 'auto', *extra)
    assert 'head.fc.weight' in weights(result)


def test_losses_that_are_not_finite_are_skipped_and_nothing_broken_is_saved(config, tmp_path, capsys):
    """At this learning rate no loss after the first update is finite."""
    options = ['--lr', '1e30', '--opt', 'sgd', '--epochs', 4]
    run(config, *options)
    rows = summary(tmp_path / 'output' / 'run')
    assert [row['train_skipped'] for row in rows][-1] != '0'
    assert 'steps skipped' in capsys.readouterr().out
    saved = load_latest(tmp_path / 'output' / 'run')['state_dict']
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    with pytest.raises(SystemExit, match=r'3 steps in a row were skipped.*try a lower --lr than 1e\+30'):
        run(config, *options, '--max-nonfinite', 3)


def test_loader_alone(config, tmp_path):
    rates = run(config, '--dry-run-loader')
    assert rates['training'] > 0 and rates['evaluation'] > 0
    assert not (tmp_path / 'output').exists()


def test_tensorboard(config):
    result = run(config, '--epochs', 1, '--log-tensorboard', '--log-interval', 1)
    assert list(result['output'].glob('events.out.tfevents.*'))


def test_tar_files(config, image_folder, tmp_path):
    (tmp_path / 'tars').mkdir()
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / 'tars' / f'{split}.tar', 'w') as archive:
            for folder in sorted((image_folder / split).iterdir()):
                archive.add(folder, folder.name)
    from_tar = run(config, '--data-dir', tmp_path / 'tars', '--experiment', 'tar')
    from_folder = run(config, '--experiment', 'folder')
    assert from_tar['images'] == 8
    assert all(torch.equal(a, b) for a, b in zip(
        weights(from_tar).values(), weights(from_folder).values(), strict=True))


def test_torchvision_dataset(config):
    assert run(config, '--dataset', 'torch/image_folder', '--epochs', 1)['images'] == 8


def test_webdataset_shards_resume_in_the_middle_of_an_epoch(config, image_folder, tmp_path):
    (tmp_path / 'shards').mkdir()
    for split in ('train', 'val'):
        for shard, label in enumerate(('dark', 'light')):
            with webdataset.TarWriter(str(tmp_path / 'shards' / f'{split}-{shard}.tar')) as sink:
                for path in sorted((image_folder / split / label).iterdir()):
                    sink.write({'__key__': f'{label}{path.stem}', 'png': path.read_bytes(), 'cls': shard})
    options = ['--dataset', 'wds/shards', '--data-dir', tmp_path / 'shards', '--train-split', 'train-{0..1}.tar',
               '--val-split', 'val-{0..1}.tar', '--train-num-samples', 16, '--val-num-samples', 8, '--num-classes', 2,
               '--workers', 1, '--batch-size', 4, '--log-interval', 1]
    unbroken = run(config, *options, '--experiment', 'unbroken')
    assert unbroken['images'] == 8
    options += ['--experiment', 'stopped']
    signal_when(tmp_path / 'output' / 'stopped' / 'metrics.jsonl', 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(config, *options)
    resumed = run(config, *options, '--resume', 'auto')
    assert summary(resumed['output']) == summary(unbroken['output'])
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(unbroken).values(), strict=True))


def launch(config, *argv):
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(SCRIPT),
         '--config', str(config), *argv], capture_output=True, text=True)


def test_two_processes_share_the_work_and_one_speaks(config, image_folder):
    options = ['--epochs', '2', '--batch-size', '4', '--model-ema', '--model-ema-decay', '.5', '--aug-repeats', '2']
    result = launch(config, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('epoch 1/2') == 1
    folder = Path(result.stdout.split('Everything is in ')[1].strip())
    found = float(summary(folder)[-1]['eval_top1'])
    alone = run(config, *options, '--resume', 'auto')  # all epochs are done
    assert alone['top1'] == found and alone['images'] == 8


def test_batch_norms_of_two_processes_end_alike(config, tmp_path):
    """CvT-LS has running statistics; every process evaluates with the first one's."""
    result = launch(
        config, '--model', 'cvt_ls_13', '--model-kwargs', 'embed_dims=(8,16,16)', 'num_heads=(1,2,2)', 'depths=(1,1,1)',
        'window_size=2', 'rank=2', '--batch-size', '4', '--epochs', '1')
    assert result.returncode == 0, result.stderr
    assert math.isfinite(float(summary(tmp_path / 'output' / 'run')[0]['eval_loss']))


def test_full_disk_ends_the_run_with_one_line_and_a_whole_checkpoint(config, tmp_path):
    """On a real file system of 400 kB, in a mount name space of its own."""
    command = (
        'mount -t tmpfs -o size=400k tmpfs "$1" && shift && "$@"; status=$?; cp "$0"/run/*.tar "$RESCUED"; '
        'exit $status')
    for name in ('disk', 'rescued'):
        (tmp_path / name).mkdir()
    result = subprocess.run(
        ['unshare', '--map-root-user', '--mount', 'sh', '-c', command, str(tmp_path / 'disk'), str(tmp_path / 'disk'),
         sys.executable, str(SCRIPT), '--config', str(config), '--output', str(tmp_path / 'disk'), '--epochs', '9'],
        capture_output=True, text=True, env={**os.environ, 'RESCUED': str(tmp_path / 'rescued')})
    assert result.returncode == 1, result.stdout
    assert 'cannot be written: No space left on device; its previous content is unchanged' in result.stderr
    assert 'Traceback' not in result.stderr
    assert load_latest(tmp_path / 'rescued') is not None


def test_processes_that_cannot_be_joined(config):
    environment = {**os.environ, 'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}  # and no master's address
    environment.pop('MASTER_ADDR', None)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), '--config', str(config)], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and 'error: --device cpu: the processes cannot be joined' in result.stderr


def test_more_images_than_two_processes_have(config):
    result = launch(config, '--batch-size', '16')
    assert result.returncode == 1
    assert 'error: --batch-size 16 of 2 processes exceeds the 16 training images' in result.stderr


def test_split_is_chosen_by_name(config, image_folder):
    write_images(image_folder / 'other', 3)
    assert run(config, '--val-split', 'other', '--epochs', 1)['images'] == 6
