"""The training script, end to end on a folder of 16 images."""
import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from malicious import Gadget
from PIL import Image
from training_helpers import write_images

import eval_imagenet
import train_imagenet

SCRIPT = Path(train_imagenet.__file__)


def run(config, *argv):
    return train_imagenet.main(['--config', str(config), *argv])


def test_end_to_end(config, capsys):
    result = run(config)
    output = result['output']
    assert sorted(p.name for p in output.iterdir()) == [
        'args.yaml', 'attention.png', 'last.pth.tar', 'learning_curve.png', 'metrics.jsonl', 'model_best.pth.tar',
        'predictions.png', 'previous.pth.tar', 'summary.csv',
    ]
    with open(output / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert float(rows[-1]['eval_top1']) == result['top1']
    assert result['images'] == 8
    assert f'top-1 {result["top1"]:.2f} %, top-5 100.00 % on 8 images' in capsys.readouterr().out
    for name in ('attention', 'learning_curve', 'predictions'):
        assert min(Image.open(output / f'{name}.png').size) > 300


def test_checkpoint_loads_into_timm_and_gives_the_printed_accuracy(config, image_folder):
    result = run(config, '--epochs', '1')
    model = timm.create_model(
        'vil_ls_tiny', num_classes=2, img_size=32, patch_size=4, embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2),
        depths=(1, 1, 1, 1), window_size=2, rank=3, checkpoint_path=result['output'] / 'last.pth.tar',
    ).eval()
    dataset = timm.data.create_dataset('', root=str(image_folder), split='validation')
    dataset.transform = timm.data.create_transform(32, crop_pct=0.875, interpolation='bicubic')
    right = sum(int(model(image[None]).argmax() == target) for image, target in dataset)
    assert 100 * right / len(dataset) == result['top1']


def test_same_seed_gives_the_same_weights(config):
    first = torch.load(run(config, '--experiment', 'a')['output'] / 'last.pth.tar')['state_dict']
    second = torch.load(run(config, '--experiment', 'b')['output'] / 'last.pth.tar')['state_dict']
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_averaged_weights_mixup_clipping_and_workers(config):
    result = run(
        config, '--model-ema', '--model-ema-decay', '.5', '--mixup', '.8', '--cutmix', '1', '--mixup-off-epoch', '1',
        '--clip-grad', '1', '--aa', 'rand-m3-inc1', '--reprob', '.25', '--channels-last', '--workers', '1',
    )
    checkpoint = torch.load(result['output'] / 'last.pth.tar')
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys()
    assert not torch.equal(checkpoint['state_dict']['head.fc.weight'], checkpoint['state_dict_ema']['head.fc.weight'])


def test_starts_from_a_checkpoint(config):
    first = run(config, '--epochs', '1')['output'] / 'last.pth.tar'
    again = run(config, '--epochs', '1', '--lr', '0', '--experiment', 'again', '--initial-checkpoint', str(first))
    before, after = (torch.load(p)['state_dict'] for p in (first, again['output'] / 'last.pth.tar'))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_model_without_long_short_attention_gets_no_attention_picture(config, capsys):
    result = run(config, '--model', 'test_vit2', '--model-kwargs', '--epochs', '1')
    assert not (result['output'] / 'attention.png').exists()
    assert 'test_vit2 has no long-short attention' in capsys.readouterr().out


def test_evaluation_classes_keep_the_indices_of_training(config, image_folder):
    """A test split that lacks the first class must not number the second one 0."""
    for path in (image_folder / 'val' / 'dark').iterdir():
        path.unlink()
    (image_folder / 'val' / 'dark').rmdir()
    datasets = train_imagenet.create_datasets(train_imagenet.parse_args(['--config', str(config)]))
    assert {datasets.val[i][1] for i in range(len(datasets.val))} == {1}


def test_class_names_are_in_the_checkpoint_and_pictures_and_evaluation_goes_by_them(config, image_folder, capsys):
    """One class has a name in Latin-1, the other looks like the number of a class; an evaluation lacks the first."""
    for split in ('train', 'val'):
        os.rename(image_folder / split / 'dark', os.fsencode(image_folder / split) + b'/$ \xe9')
        (image_folder / split / 'light').rename(image_folder / split / '0')
    result = run(config, '--epochs', '1')
    assert (result['output'] / 'predictions.png').exists()
    assert torch.load(result['output'] / 'last.pth.tar')['class_names'] == ['$ \u00e9', '0'][::-1]
    capsys.readouterr()
    parts = []
    for folder in list((image_folder / 'val').iterdir()):  # each class alone
        folder.rename(image_folder / 'away')
        parts.append(eval_imagenet.main([
            '--model', 'vil_ls_tiny', '--model-kwargs', 'img_size=32', 'patch_size=4', 'embed_dims=(8,16,16,16)',
            'num_heads=(1,2,2,2)', 'depths=(1,1,1,1)', 'window_size=2', 'rank=3', '--num-classes', '2', '--img-size',
            '32', '--checkpoint', str(result['output'] / 'last.pth.tar'), '--data-dir', str(image_folder), '--device',
            'cpu', '--workers', '0']))
        (image_folder / 'away').rename(folder)
    assert [part['images'] for part in parts] == [4, 4]
    assert sum(part['top1'] for part in parts) / 2 == result['top1']
    assert "has no images of 1 of the model's 2 classes: '0'" in capsys.readouterr().out


def test_classes_of_the_splits_are_compared(config, image_folder, capsys):
    shutil.rmtree(image_folder / 'val' / 'dark')
    for split in ('train', 'val'):
        (image_folder / split / '.ipynb_checkpoints').mkdir()
        shutil.copy(image_folder / 'train' / 'dark' / '0.png', image_folder / split / '.ipynb_checkpoints')
    datasets = train_imagenet.create_datasets(train_imagenet.parse_args(['--config', str(config)]))
    assert datasets.class_names == ['dark', 'light'] and {datasets.val[i][1] for i in range(4)} == {1}
    assert "val has no images of 1 of the 2 classes of training: 'dark'" in capsys.readouterr().out


def test_class_map_with_a_byte_order_mark(config, image_folder, capsys):
    (image_folder / 'map.txt').write_bytes(b'\xef\xbb\xbflight\nbird\ndark\n')
    options = ['--config', str(config), '--class-map', str(image_folder / 'map.txt')]
    datasets = train_imagenet.create_datasets(train_imagenet.parse_args(options))
    assert datasets.class_names == ['light', 'bird', 'dark']
    assert {datasets.train[i][1] for i in range(16)} == {datasets.val[i][1] for i in range(8)} == {0, 2}
    assert "train has no images of 1 classes of" in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['--num-classes', '7'], '--num-classes 7 does not fit .* which has 2 classes: pass --num-classes 2'),
    (['--data-dir', 'nowhere'], '--data-dir nowhere does not exist'),
    (['--val-split', 'test'], r"no folder for split 'test' \(looked for test\); it holds train, val"),
    (['--batch-size', '64'], '--batch-size 64 exceeds the 16 training images'),
    (['--model', 'vil_ls_tinny'], "unknown model 'vil_ls_tinny'; did you mean 'vil_ls_tiny'"),
    (['--model-kwargs', 'ranks=3'], 'model vil_ls_tiny cannot be built .*ranks'),
    (['--initial-checkpoint', 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
    (['--opt', 'adamwww'], '--opt adamwww'),
    (['--lr', '1e30', '--opt', 'sgd', '--max-nonfinite', '2'], 'at update 3 .*: 2 steps in a row were skipped'),
    (['--sync-bn'], '--sync-bn: torch supports it on GPUs only'),
    (['--resume', 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
    (['--resume', 'auto', '--experiment', ''], '--resume auto: pass the --experiment'),
    (['--epoch', '3'], "unknown argument --epoch; did you mean '--epochs'"),
])
def test_wrong_input_is_one_line(config, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(config, *argv)
    assert '\n' not in str(error.value)


def test_arguments_of_the_optimiser(config, capsys):
    result = run(config, '--epochs', '1', '--opt', 'adamw', '--opt-kwargs', 'fused=True')
    group = torch.load(result['output'] / 'last.pth.tar', weights_only=True)['optimizer']['param_groups'][0]
    assert group['fused'] is True
    with pytest.raises(SystemExit, match=r"--opt adamw: .*unexpected keyword argument 'fusd'"):
        run(config, '--opt', 'adamw', '--opt-kwargs', 'fusd=True')


def test_empty_split(config, image_folder):
    for path in (image_folder / 'train').rglob('*.png'):
        path.unlink()
    with pytest.raises(SystemExit, match='Found 0 images in subfolders'):
        run(config)


def test_test_split_with_unknown_classes(config, image_folder):
    write_images(image_folder / 'val' / 'extra', 1)
    (image_folder / 'val' / 'extra' / 'dark').rename(image_folder / 'val' / 'blue')
    shutil.rmtree(image_folder / 'val' / 'extra')
    with pytest.raises(SystemExit, match=r"has 1 classes that .* lacks, e.g. \['blue'\]"):
        run(config)


@pytest.mark.parametrize('option', ['--initial-checkpoint', '--resume'])
def test_malicious_checkpoint_is_refused_before_training(config, tmp_path, option):
    torch.save(dict(state_dict=Gadget(tmp_path / 'ran')), tmp_path / 'bad.pth')
    with pytest.raises(SystemExit, match=r'bad.pth was refused: it holds posix.system|nt.system') as error:
        run(config, option, str(tmp_path / 'bad.pth'))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists()


def test_interrupt_ends_cleanly(config, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), '--config', str(config), '--epochs', '100000', '--workers', '1'],
        cwd=SCRIPT.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # shells start background jobs, perhaps this test run, with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith('epoch 2/'):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Stopped by signal 2 after update' in out and 'continue with --resume auto' in out
    assert 'Traceback' not in err


def test_grey_images(config, image_folder, capsys):
    kwargs = ['img_size=32', 'patch_size=4', 'embed_dims=(8,16,16,16)', 'num_heads=(1,2,2,2)', 'depths=(1,1,1,1)',
              'window_size=2', 'rank=3']
    argv = ['--config', str(config), '--epochs', '1', '--aa', 'rand-m5', '--reprob', '.5', '--color-jitter', '.3']
    result = train_imagenet.main([*argv, '--model-kwargs', *kwargs, 'in_chans=1'])
    assert "input (1, 32, 32)" in capsys.readouterr().out and result['images'] == 8
    with pytest.raises(SystemExit, match='in_chans=4: images are read with 3 channels'):
        train_imagenet.main([*argv, '--model-kwargs', *kwargs, 'in_chans=4'])
    with pytest.raises(SystemExit, match='--mean or --std: mean must have one value or 3 values'):
        train_imagenet.main([*argv, '--mean', '.5', '.5'])


@pytest.mark.parametrize(('name', 'message'), [
    ('local-dir:nowhere', 'Config file not found: nowhere'), ('vil_ls_tiny.wrong', "unknown tag 'wrong' of model"),
    ('foo:bar', "Unknown model source 'foo'")])
def test_model_that_is_nowhere(config, name, message):
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run(config, '--model', name, '--model-kwargs')
