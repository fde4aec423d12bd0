"""The command as users call it: in a process of its own."""
import csv
import io
import json
import subprocess
import sys

import pytest

from ls_vision.cli import COMMANDS, main


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
    (['flops', 'vil_ls_tiny', '--img-size', '3'], 'error: vil_ls_tiny cannot be counted at 3: Image of 3 x 3'),
])
def test_wrong_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count('\n') == 1


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
