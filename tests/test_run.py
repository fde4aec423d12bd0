"""`python -m ls_vision.run` makes the models known to scripts that do not import the package."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'ls_vision'

SCRIPT = '''
import argparse, os, neighbour, timm
parser = argparse.ArgumentParser()
parser.add_argument('--model')
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=neighbour.CLASSES, device='meta')
print('built', type(model).__name__, model.num_classes, 'rank', os.environ.get('RANK', '-'))
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'neighbour.py').write_text('CLASSES = 7\n')
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


def test_single_process(script):
    out = subprocess.run(
        [sys.executable, '-m', 'ls_vision.run', str(script), '--model', 'vil_ls_tiny'],
        capture_output=True, text=True, check=True)
    assert out.stdout.strip() == 'built LongShortViL 7 rank -'


def test_torchrun_registers_in_every_rank(script):
    out = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'ls_vision.run',
         str(script), '--model', 'cvt_ls_13'], capture_output=True, text=True, check=True)
    assert sorted(out.stdout.split('\n'))[-2:] == [
        'built LongShortCvT 7 rank 0', 'built LongShortCvT 7 rank 1']


def test_missing_script():
    out = subprocess.run([sys.executable, '-m', 'ls_vision.run', 'nowhere.py'], capture_output=True, text=True)
    assert out.returncode == 1 and "there is no script 'nowhere.py'" in out.stderr
    assert 'Traceback' not in out.stderr


BULK_RUNNER = '''
import csv, json, subprocess, sys
from timm.models import list_models
pattern, results, *command = sys.argv[1:]
rows = []
for name in list_models(pattern):
    out = subprocess.check_output([sys.executable, '-u', *command, '--model', name]).decode()
    rows.append(json.loads(out.split('--result')[-1]))
with open(results, 'w') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
'''

BENCHMARK = '''
import argparse, json, sys, timm
parser = argparse.ArgumentParser()
parser.add_argument('--model')
args = parser.parse_args()
model = timm.create_model(args.model, device='meta')
package = sys.modules[type(model).__module__.split('.')[0]].__file__
print('--result', json.dumps(dict(model=args.model, package=package)))
'''


def run_elsewhere(tmp_path, *args, python_path=()):
    """`python -m ls_vision.run` in another folder, where children would not find a package that is not installed."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(python_path))
    code = (
        f'import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from ls_vision import run; run.main({list(args)!r})')
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True).stdout


def test_children_know_the_models(tmp_path):
    """As timm's bulk_runner.py starts its benchmark.py: by the interpreter's path, once for each model."""
    (tmp_path / 'bulk_runner.py').write_text(BULK_RUNNER)
    (tmp_path / 'benchmark.py').write_text(BENCHMARK)
    run_elsewhere(tmp_path, 'bulk_runner.py', 'vil_ls_small*', 'results.csv', 'benchmark.py')
    with open(tmp_path / 'results.csv', newline='') as file:
        packages = {row['model']: row['package'] for row in csv.DictReader(file)}
    assert packages == dict.fromkeys(('vil_ls_small', 'vil_ls_small_linear'), str(PACKAGE / '__init__.py'))


def test_children_keep_their_own_start_up_file_and_do_not_import_timm(tmp_path):
    (tmp_path / 'startup').mkdir()
    (tmp_path / 'startup' / 'sitecustomize.py').write_text("print('own start-up file')")
    (tmp_path / 'script.py').write_text(
        'import subprocess, sys\n'
        "code = 'import sys; print(*(name in sys.modules for name in (\"torch\", \"timm\", \"ls_vision\")))'\n"
        "print(subprocess.check_output([sys.executable, '-c', code], text=True))\n")
    out = run_elsewhere(tmp_path, 'script.py', python_path=[str(tmp_path / 'startup')])
    assert out.split('\n')[-4:-2] == ['own start-up file', 'False False False']
