"""The command as users call it: in a process of its own."""
import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from PIL import Image

from ls_vision.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run(*args, code=0):
    result = subprocess.run([sys.executable, '-m', 'ls_vision', *args], capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    assert 'Traceback' not in result.stderr
    return result


def test_flops_as_json():
    lines = run('flops', 'vil_ls_tiny', '--img-size', '224', '640x480', '--format', 'json').stdout.splitlines()
    square, oblong = map(json.loads, lines)
    assert square['model'] == 'vil_ls_tiny' and square['img_size'] == 224 and square['params'] == 6_721_078
    assert square['macs'] == pytest.approx(1.32e9, rel=0.01)
    assert oblong['img_size'] == [640, 480] and oblong['macs'] > square['macs']


def test_flops_as_tables(capsys):
    main(['flops', 'vil_ls_tiny', 'vit_tiny_patch16_224', '--img-size', '64'])
    out = capsys.readouterr().out
    assert '| vil_ls_tiny' in out and 'stages.2' in out and 'closed formulas agree' in out
    main(['flops', 'vil_ls_tiny', '--img-size', '64', '--format', 'csv'])
    row, = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row['model'] == 'vil_ls_tiny' and int(row['macs']) == int(row['counters.torch'])


@pytest.mark.parametrize('args, message', [
    (['flops', 'vil_ls_medum'], "error: unknown model 'vil_ls_medum'; did you mean 'vil_ls_medium'"),
    (['flops', 'vil_ls_tiny', '--img-size', '22x4x3'], "error: image size '22x4x3': expected pixels"),
    (['flops', 'vil_ls_tiny', '--img-size', '1000000000'], "error: image size '1000000000': expected at most"),
    (['flops', 'vil_ls_tiny.wrong'], "error: unknown tag 'wrong' of model 'vil_ls_tiny'; vil_ls_tiny."),
    (['flops', 'resnet18.wrong'], "error: unknown tag 'wrong' of model 'resnet18'; resnet18.a1_in1k, "),
    (['bench', 'vil_ls_tiny.wrong'], "error: unknown tag 'wrong' of model 'vil_ls_tiny'; vil_ls_tiny."),
    (['flops', 'local-dir:nowhere'], "error: model 'local-dir:nowhere': Config file not found: nowhere"),
    (['flops', 'foo:bar'], "error: model 'foo:bar': Unknown model source 'foo'"),
    (['attention', 'a.png', '--out', 'a.npz'], 'error: --out a.npz: must end in .png'),
    (['attention', 'a.png', '--out', 'nowhere/a.png'], 'error: --out nowhere/a.png: there is no folder nowhere'),
    (['attention', __file__, '--out', 'a.JPG'], 'error: --out a.JPG: must end in .png'),
    (['flops', 'vil_ls_tiny', '--img-size', '3'], 'error: vil_ls_tiny cannot be counted at 3: Image of 3 x 3'),
])
def test_wrong_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count('\n') == 1


@pytest.mark.parametrize('value', ['nan', '0', '-1', 'inf', 'soon'])
@pytest.mark.parametrize('option', ['--seconds', '--memory-limit'])
def test_times_that_are_none(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['bench', 'vil_ls_tiny', option, value])
    assert stopped.value.code == 2 and f'{value!r}: expected a number above 0' in capsys.readouterr().err


def test_arguments_that_are_not_pairs(capsys):
    with pytest.raises(SystemExit):
        main(['attention', 'a.png', '--model-kwargs', 'patch_size'])
    assert "--model-kwargs: 'patch_size' is not NAME=VALUE" in capsys.readouterr().err


def test_picture_is_not_overwritten_by_its_sheet(tmp_path, capsys):
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
    (tmp_path / 'link.png').symlink_to(tmp_path / 'a.png')
    with pytest.raises(SystemExit):
        main(['attention', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'link.png')])
    assert 'is the picture itself' in capsys.readouterr().err


def test_models_of_a_local_folder(tmp_path, capsys):
    model = timm.create_model(
        'vil_ls_tiny', num_classes=5, embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), rank=2)
    timm.models.save_for_hf(model, tmp_path, model_args=dict(
        embed_dims=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], rank=2))
    main(['flops', f'local-dir:{tmp_path}', '--format', 'json'])
    assert json.loads(capsys.readouterr().out)['params'] == sum(p.numel() for p in model.parameters())


LIGHT = """
import sys
from ls_vision.{module} import main
try:
    main({args})
except SystemExit as e:
    assert e.code == {code}
assert not {{'torch', 'timm', 'numpy'}} & sys.modules.keys(), sorted(sys.modules)
"""


@pytest.mark.parametrize('module, args, code', [
    ('cli', ['--help'], 0), ('export', ['--help'], 0), ('run', ['--help'], 0),
    ('cli', ['choose', '--img-size', 'x'], 2)])
def test_help_and_wrong_arguments_import_no_torch(module, args, code, tmp_path):
    """The imports take seconds."""
    (tmp_path / 'ls-vision').write_text(LIGHT.format(module=module, args=args, code=code))
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, str(tmp_path / 'ls-vision')], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert 'usage: ' in result.stdout if code == 0 else result.stderr.startswith("error: image size 'x': expected")


def test_help_of_every_command_in_two_seconds():
    for name in COMMANDS:
        start = time.perf_counter()
        run(name, '--help')
        assert time.perf_counter() - start < 2


@pytest.mark.slow
def test_reader_that_stops_early():
    """`ls-vision flops ... | head -1`."""
    command = [sys.executable, '-m', 'ls_vision', 'flops', 'vil_ls_tiny', '--img-size', '64']
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 141 and 'Traceback' not in result.stderr and 'Exception' not in result.stderr


@pytest.mark.parametrize('name', COMMANDS)
def test_help_has_examples(name, capsys):
    for args in (['--help'], [name, '--help']):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 0
    assert f'    ls-vision {name}' in capsys.readouterr().out


@pytest.mark.slow
def test_models():
    rows = list(csv.DictReader(io.StringIO(run('models', '--format', 'csv').stdout)))
    medium = next(row for row in rows if row['model'] == 'vil_ls_medium')
    assert (medium['params'], medium['top1']) == ('39799423', '83.8')
    assert len(rows) == 18
