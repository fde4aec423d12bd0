"""The real script on small images: its files, its resume and its errors."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from detection_helpers import TINY, write_coco

import train_detection
from ls_vision.runtime.archives import load_checkpoint
from ls_vision.runtime.errors import UserError
from ls_vision.training.checkpoint import save_checkpoint
from ls_vision.training.resume import restore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    """A config file for a detector of a hundred thousand parameters on six images."""
    values = dict(
        train_annotations=str(write_coco(tmp_path / 'train', 6, size=(160, 128))),
        val_annotations=str(write_coco(tmp_path / 'val', 2, size=(160, 128), seed=1)),
        detector='fcos', model='vil_ls_tiny_linear', model_kwargs=TINY, out_channels=32, strides=[8, 16],
        crop_size=128, crop_scale=[0.8, 1.25], vflip=0.5, transpose=0.5, color_jitter=0.2, photometric_distort=0.5,
        batch_size=2, drop_path=0.2, opt='adamw', lr=2e-3, epochs=2, warmup_epochs=0, sched_on_updates=True,
        clip_grad=1., model_ema=True, model_ema_decay=0.9, log_interval=1, workers=0, device='cpu',
        output=str(tmp_path / 'output'), experiment='run')
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(values))
    return path


def run(config, *extra):
    return train_detection.main(['--config', str(config), *extra])


def start(config, *extra, launcher=()):
    """The script as a process."""
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / 'train_detection.py'), '--config', str(config), *extra],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(folder):
    checkpoint = load_checkpoint(folder / 'last.pth.tar')
    return {**checkpoint['state_dict'], **{f'ema.{k}': v for k, v in checkpoint['state_dict_ema'].items()}}


def assert_same_run(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (a / 'summary.csv').read_text() == (b / 'summary.csv').read_text()
    assert (a / 'metrics.jsonl').read_text() == (b / 'metrics.jsonl').read_text()


def test_run_leaves_everything(config, tmp_path):
    result = run(config)
    output = tmp_path / 'output' / 'run'
    assert result['output'] == output
    names = {path.name for path in output.iterdir()}
    assert {'last.pth.tar', 'model_best.pth.tar', 'args.yaml', 'summary.csv', 'metrics.jsonl', 'pictures'} <= names
    assert sorted(p.name for p in (output / 'pictures').iterdir()) == ['0.png', '1.png']
    assert 0 <= result['AP'] <= 1
    assert load_checkpoint(output / 'last.pth.tar')['class_names'] == ['square', 'bar']
    steps = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    assert [line['update'] for line in steps if 'update' in line] == [1, 2, 3, 4, 5, 6]
    assert len((output / 'summary.csv').read_text().splitlines()) == 3


@pytest.mark.parametrize('workers', ['0', '2'])
def test_interrupted_and_resumed_equals_unbroken(config, tmp_path, workers):
    """Stopped by SIGTERM in the middle of an epoch, killed in another, and resumed each time."""
    start(config, '--epochs', '4', '--experiment', 'unbroken', '--workers', workers).wait(300)
    folder = tmp_path / 'output' / 'broken'
    broken = ('--epochs', '4', '--experiment', 'broken', '--workers', workers)
    codes = []
    for number, after in ((signal.SIGTERM, 2), (signal.SIGKILL, 8)):
        process = start(config, *broken, '--resume', 'auto')
        log = folder / 'metrics.jsonl'
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count('"update"') >= after:
                process.send_signal(number)
                break
            time.sleep(.01)
        codes.append(process.wait(120))
    final = start(config, *broken, '--resume', 'auto')
    assert final.wait(300) == 0, final.stdout.read()
    assert codes == [128 + signal.SIGTERM, -signal.SIGKILL]
    assert_same_run(tmp_path / 'output' / 'unbroken', folder)


def build_state(config, *argv):
    from ls_vision.detection.config import parse_args
    from ls_vision.runtime.processes import Processes
    from ls_vision.training.data_record import describe_annotations

    args = parse_args(['--config', str(config), *argv])
    train_set, _ = train_detection.read_sets(args)
    model = train_detection.build_model(args, len(train_set.class_names))
    state = train_detection.build_state(args, model, Processes(torch.device('cpu')), updates_per_epoch=3)
    state.class_names, state.data = train_set.class_names, describe_annotations(train_set)
    return args, state


def test_what_a_resumed_detector_takes_from_this_run(config, tmp_path):
    args, state = build_state(config)
    state.progress.epoch, state.progress.num_updates = 1, 3
    checkpoint = state.checkpoint(args, torch.zeros(0, dtype=torch.long))
    path = tmp_path / 'train' / 'annotations.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] -= 1
    path.write_text(json.dumps(content))
    args, state = build_state(config, '--lr', '4e-3', '--sched', 'constant', '--layer-decay', '.5')
    notes = restore(state, checkpoint, args, 'last.pth.tar')
    assert 'lr 0.002 -> 0.004' in notes[0] and 'layer_decay None -> 0.5' in notes[0]
    assert 'the training data have changed: 6 samples as before, but other ones' in notes
    assert max(group['lr'] for group in state.optimizer.param_groups) == 4e-3
    state.class_names = ['disc', 'bar']
    with pytest.raises(UserError, match=r'trained on 2 classes .*: missing square; new disc'):
        restore(state, checkpoint, args, 'last.pth.tar')


@pytest.mark.slow
def test_resumed_with_other_settings_and_fewer_images(config, tmp_path, capsys):
    run(config, '--epochs', '1')
    path = tmp_path / 'train' / 'annotations.json'
    content = json.loads(path.read_text())
    dropped = content['images'].pop()['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != dropped]
    path.write_text(json.dumps(content))
    run(config, '--epochs', '2', '--lr', '4e-3', '--sched', 'constant', '--resume', 'auto')
    text = capsys.readouterr().out
    assert 'used from here on: ' in text and 'lr 0.002 -> 0.004' in text
    assert 'the training data have changed: 6 -> 5 samples' in text
    checkpoint = load_checkpoint(tmp_path / 'output' / 'run' / 'last.pth.tar')
    assert {group['lr'] for group in checkpoint['optimizer']['param_groups']} == {4e-3}
    assert checkpoint['class_names'] == ['square', 'bar']


def test_two_processes(config, tmp_path):
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    process = start(config, '--batch-size', '1', launcher=launcher)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert text.count('Finished in') == 1
    assert 'each of 2 images' in text


@pytest.mark.parametrize('detector', ['retinanet', 'mask_rcnn'])
def test_other_detectors_on_tiles_and_whole_images(config, detector):
    extra = ['--detector', detector, '--epochs', '1']
    if detector == 'retinanet':
        extra += ['--tile-size', '96', '--tile-overlap', '40']
    else:
        extra += ['--min-size', '96', '128', '--strides', '4', '8', '16', '32']
    result = run(config, *extra)
    assert ('mask_AP' in result) == (detector == 'mask_rcnn')


def test_layer_decay_and_frozen_stages(config, tmp_path):
    run(config, '--epochs', '1', '--layer-decay', '0.8', '--trainable-stages', '2')
    groups = load_checkpoint(tmp_path / 'output' / 'run' / 'last.pth.tar')['optimizer']['param_groups']
    assert len({group.get('lr_scale', 1.) for group in groups}) > 1


def test_starts_from_a_classifier(config, tmp_path):
    import timm

    classifier = timm.create_model('vil_ls_tiny_linear', num_classes=10, **TINY)
    path = save_checkpoint(tmp_path, dict(state_dict=classifier.state_dict()), is_best=False)
    run(config, '--epochs', '1', '--lr', '0', '--initial-backbone', str(path))
    trained = weights(tmp_path / 'output' / 'run')
    name = 'stages.1.blocks.0.attn.proj.weight'
    assert torch.equal(trained[f'backbone.body.model.{name}'], classifier.state_dict()[name])
    classifier = timm.create_model('vil_ls_tiny_linear', num_classes=10)
    path = save_checkpoint(tmp_path, dict(state_dict=classifier.state_dict()), is_best=False)
    with pytest.raises(SystemExit, match='does not fit'):
        run(config, '--initial-backbone', str(path))


def spoil(tmp_path):
    path = tmp_path / 'train' / 'annotations.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'] = [150, 0, 50, 5]
    content['annotations'][1]['category_id'] = 55
    path.write_text(json.dumps(content))
    path = tmp_path / 'val' / 'annotations.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'] = [5, 5, 0, 5]
    path.write_text(json.dumps(content))


def test_bad_annotations_stop_the_run_before_training(config, tmp_path, capsys):
    spoil(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(config)
    text = str(error.value.code)
    assert text.startswith('error: ') and '3 problems' in text
    for problem in (r'train/annotations.json: annotations[0] (id 1): box', 'category_id 55 is not known',
                    'val/annotations.json: annotations[0] (id 1): box [5.0, 5.0, 5.0, 10.0] has zero'):
        assert problem in text
    assert not (tmp_path / 'output').exists()

    run(config, '--skip-bad', '--epochs', '1')
    text = capsys.readouterr().out
    assert 'Left out 3 bad records' in text and '16 objects' in text


def test_images_of_which_half_is_missing(config, tmp_path, capsys):
    """Their headers are intact, so that only decoding tells."""
    for path in (tmp_path / 'train' / '1.png', tmp_path / 'val' / '0.png'):
        path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    result = run(config, '--skip-bad', '--epochs', '1', '--crops-per-image', '2', '--batch-size', '4')
    out = capsys.readouterr().out
    assert ', 1 training images unreadable, AP' in out
    assert '1 of 2 evaluation images cannot be decoded: their objects count as missed' in out
    assert [path.name for path in (result['output'] / 'pictures').iterdir()] == ['1.png']


@pytest.mark.parametrize('split', ['train', 'val'])
def test_sets_of_crowds_alone_are_refused(config, tmp_path, split):
    path = tmp_path / split / 'annotations.json'
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": "1"'))
    with pytest.raises(SystemExit, match=rf'{split}/annotations\.json: no object to train on or to find: .* crowds'):
        run(config)


def test_mask_rcnn_wants_masks_before_training(config, tmp_path):
    path = tmp_path / 'train' / 'annotations.json'
    path.write_text(path.read_text().replace('"segmentation": [[', '"segmentation": [], "other": [[', 1))
    with pytest.raises(SystemExit, match=r'annotations\[0\] \(id 1\): has no segmentation, which Mask R-CNN needs'):
        run(config, '--detector', 'mask_rcnn')


@pytest.mark.parametrize(('extra', 'message'), [
    (('--train-annotations', 'nowhere.json'), 'nowhere.json do not exist'),
    (('--model', 'vil_ls_tinny'), 'cannot be built'),
    (('--model', 'local-dir:nowhere'), 'cannot be built: Config file not found: nowhere'),
    (('--crop-scale', '2', '1'), '--crop-scale'),
    (('--hflip', '1.5'), '--hflip 1.5: must be a probability, from 0 to 1'),
    (('--photometric-distort', 'nan'), '--photometric-distort nan: must be a probability'),
    (('--max-size', '99'), '--max-size 99: images are resized only with --min-size'),
    (('--model-kwargs', 'in_chans=1'), '--model-kwargs in_chans=1: images are read as RGB'),
    (('--opt-kwargs', 'lr=0.1'), '--opt-kwargs lr=0.1: pass --lr'),
    (('--tile-size', '64', '--tile-overlap', '64'), '--tile-overlap 64'),
    (('--batch-size', '100'), 'exceeds the 6 samples'),
    (('--croop-size', '3'), "unknown argument --croop-size; did you mean '--crop-size'"),
    (('--strides', '2'), r'strides \(2,\): vil_ls_tiny_linear has feature maps of strides'),
    (('--lr', '1e30', '--epochs', '30', '--clip-grad', '1e30'), 'steps in a row were skipped|not finite'),
])
def test_one_clear_error(config, extra, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(config, *extra)
    assert str(error.value.code).startswith('error: ')


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """Untrained weights of the model of configs/detection/deepforest_backbone.yaml."""
    from ls_vision.evaluation.classifier import create_classifier
    from ls_vision.training.config import parse_args

    args = parse_args(['--config', str(ROOT / 'configs' / 'detection' / 'deepforest_backbone.yaml')])
    path = tmp_path_factory.mktemp('classifier') / 'last.pth.tar'
    torch.save(create_classifier(args, args.num_classes).state_dict(), path)
    return path


@pytest.mark.parametrize('name', ['coco_retinanet_1x', 'coco_mask_rcnn_3x', 'deepforest'])
def test_recipes_build(name, classifier):
    from ls_vision.detection.config import parse_args
    from ls_vision.runtime.processes import Processes

    start = ['--initial-backbone', str(classifier)] if name == 'deepforest' else []
    args = parse_args(['--config', str(ROOT / 'configs' / 'detection' / f'{name}.yaml'), '--device', 'cpu', *start])
    model = train_detection.build_model(args, num_classes=80)
    state = train_detection.build_state(args, model, Processes(torch.device('cpu')), updates_per_epoch=100)
    rates = []
    for update in range(state.num_epochs * 100):
        state.scheduler.step_update(num_updates=update)
        rates.append(state.lr / args.lr)
    assert state.num_epochs == args.epochs
    assert max(rates) <= 1 and rates[0] < 0.2 and rates[-1] < 0.02
    if name == 'coco_retinanet_1x':
        assert rates[-1] / rates[500] == pytest.approx(0.01)


@pytest.mark.parametrize('name, expected', [
    ('photometric_distort', 'a number'), ('hflip', 'a number'), ('crop_scale', 'a list of numbers'),
    ('batch_size', 'an integer')])
def test_null_in_the_file_is_one_error(config, name, expected):
    config.write_text(yaml.dump({**yaml.safe_load(config.read_text()), name: None}))
    with pytest.raises(SystemExit, match=f'{name}: None is not {expected}'):
        run(config)
