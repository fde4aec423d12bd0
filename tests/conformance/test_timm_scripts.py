"""timm's own scripts, unmodified, by `python -m ls_vision.run`, on the files that its train.py left.

    python -m pytest -q tests/conformance/test_timm_scripts.py --timm-scripts FOLDER

No release of timm holds its scripts: FOLDER is a checkout of its repository, or a copy of the scripts.
"""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import SMALL, each_model, images, small
from timm.data import create_dataset, create_transform
from timm.models import load_checkpoint, save_for_hf
from torchvision.transforms.functional import to_pil_image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
ROOT = Path(__file__).parents[2]
SIZE = ['--img-size', '64', '--num-classes', '2']
CPU = ['--device', 'cpu', '--workers', '1', '--no-prefetcher']
WHOLE = ['--crop-pct', '1']


@pytest.fixture
def script(request, tmp_path):
    """Runs a script of timm and gives what it printed."""
    folder = request.config.getoption('--timm-scripts', None)
    if folder is None:
        pytest.skip("needs timm's repository: --timm-scripts FOLDER")

    def run(name, *args):
        done = subprocess.run(
            [sys.executable, '-m', 'ls_vision.run', str(Path(folder).resolve() / name), *map(str, args)], cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1'), capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout
    return run


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Bright and dark images in `train` and `val`."""
    folder = tmp_path_factory.mktemp('data')
    for index, x in enumerate(images(16)):
        path = folder / ('train', 'val')[index // 8] / ('bright', 'dark')[index % 2] / f'{index:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image((x * .1 + (.7, .3)[index % 2]).clamp(0, 1)).save(path)
    return folder


def model_args(name):
    kwargs = {key: value for key, value in SMALL[name].items() if key != 'drop_path_rate'}  # train.py gives it itself
    return ['--model', name, '--model-kwargs', 'img_size=64', *(f'{k}={v}'.replace(' ', '') for k, v in kwargs.items())]


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp('outputs')


@pytest.fixture
def checkpoints(name, script, data, outputs):
    """The folder that train.py wrote, once for each model."""
    folder = outputs / name
    if not folder.exists():
        script('train.py', *training(name, data, outputs), '--epochs', 2, '--experiment', name)
    return folder


def training(name, data, output):
    """Arguments of train.py that reach many of its parts."""
    return ['--data-dir', data, *model_args(name), *SIZE, *CPU, '--batch-size', 4, '--opt', 'muon', '--lr', '1e-3',
            '--weight-decay', '.05', '--layer-decay', '.8', '--model-ema', '--mixup', '.2', '--aa', 'rand-m5-inc1',
            '--clip-grad', '1', '--drop-path', '0', '--warmup-epochs', 0, '--output', output]


def summary(folder):
    """One row for each epoch of a run."""
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def weights(path, key='state_dict'):
    return torch.load(path, map_location='cpu', weights_only=False)[key]


def load(name, path):
    """The model with the averaged weights of a checkpoint."""
    model = small(name, num_classes=2)
    load_checkpoint(model, str(path), use_ema=True)
    return model.eval()


@torch.no_grad()
def logits(model, data):
    """Of the images for validation, in order, with the classes."""
    dataset = create_dataset('', str(data / 'val'))
    dataset.transform = create_transform((3, 64, 64), interpolation='bicubic', crop_pct=1.)
    x, y = zip(*dataset)
    return model(torch.stack(x)), torch.tensor(y)


@pytest.mark.item("timm's train.py: Muon, layer decay, EMA, mixup, RandAugment; resumed")
@each_model()
def test_train(name, script, data, checkpoints, outputs):
    rows = summary(checkpoints)
    assert len(rows) == 2 and all(0 < float(row['train_loss']) < 10 for row in rows)
    script('train.py', *training(name, data, outputs), '--epochs', 3, '--experiment', f'{name}-resumed',
           '--resume', checkpoints / 'last.pth.tar')
    rows = summary(outputs / f'{name}-resumed')
    assert [row['epoch'] for row in rows] == ['2'] and 0 < float(rows[0]['train_loss']) < 10


@pytest.mark.item("timm's validate.py and inference.py: accuracy and logits of the model in Python")
@each_model()
def test_validate_and_infer(name, script, data, checkpoints, tmp_path):
    model = load(name, checkpoints / 'last.pth.tar')
    expected, targets = logits(model, data)
    out = script('validate.py', '--data-dir', data / 'val', *model_args(name), *SIZE, *CPU, *WHOLE, '--batch-size', 3,
                 '--checkpoint', checkpoints / 'last.pth.tar', '--use-ema')
    result = json.loads(out[out.index('--result') + len('--result'):])
    assert result['top1'] == pytest.approx(100 * (expected.argmax(1) == targets).double().mean().item(), abs=1e-3)
    script('clean_checkpoint.py', '--checkpoint', checkpoints / 'last.pth.tar', '--output', tmp_path / 'clean.pth', '--no-hash')
    script('inference.py', '--data-dir', data / 'val', *model_args(name), *SIZE, *WHOLE, '--device', 'cpu', '--workers', 1,
           '--batch-size', 3, '--checkpoint', tmp_path / 'clean.pth', '--topk', 2, '--output-type', 'logit', '--include-index',
           '--results-dir', tmp_path, '--results-format', 'json', '--no-console-results')
    rows = json.loads(next(tmp_path.glob('*.json')).read_text())
    assert len(rows) == len(expected) == 8
    for row, values in zip(rows.values() if isinstance(rows, dict) else rows, expected):
        values, indices = values.sort(descending=True)
        assert row['index'] == indices.tolist()
        assert row['logit'] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-3)


@pytest.mark.item("timm's avg_checkpoints.py and clean_checkpoint.py, to safetensors as well: the files load and agree")
@each_model()
def test_average_and_clean(name, script, checkpoints, tmp_path):
    paths = [checkpoints / f'checkpoint-{epoch}.pth.tar' for epoch in (0, 1)]
    script('avg_checkpoints.py', '--input', checkpoints, '--filter', 'checkpoint-*.pth.tar', '--output',
           tmp_path / 'averaged.safetensors', '--safetensors', '-n', 2)
    script('clean_checkpoint.py', '--checkpoint', paths[1], '--output', tmp_path / 'clean.safetensors', '--no-hash',
           '--safetensors')
    states = [weights(path, 'state_dict_ema') for path in paths]
    averaged, clean = (load(name, tmp_path / f'{stem}.safetensors').state_dict() for stem in ('averaged', 'clean'))
    for key, first in states[0].items():
        torch.testing.assert_close(clean[key], states[1][key], rtol=0, atol=0)
        torch.testing.assert_close(averaged[key].double(), (first.double() + states[1][key].double()) / 2)


@pytest.mark.item("timm's onnx_export.py (both exporters, `--check-forward`) and onnx_validate.py, of a `local-dir:` model", 'onnx', 'onnxruntime')
@pytest.mark.parametrize('exporter', [[], ['--dynamo']], ids=['trace', 'dynamo'])
@each_model()
def test_onnx_scripts(name, exporter, script, data, checkpoints, tmp_path):
    model = load(name, checkpoints / 'last.pth.tar')
    model.pretrained_cfg.update(num_classes=2, input_size=(3, 64, 64))
    save_for_hf(model, tmp_path / 'model', model_args=dict(SMALL[name], img_size=64, num_classes=2))
    script('onnx_export.py', tmp_path / 'model.onnx', '--model', f'local-dir:{tmp_path / "model"}', '--img-size', 64,
           '--batch-size', 2, '--check-forward', *exporter)
    out = script('onnx_validate.py', data / 'val', '--onnx-input', tmp_path / 'model.onnx', '--img-size', 64, '--batch-size', 3,
                 '--workers', 1, *WHOLE)
    expected, targets = logits(model, data)
    accuracy = 100 * (expected.argmax(1) == targets).double().mean().item()
    assert f' * Prec@1 {accuracy:.3f}' in out, out[-500:]
