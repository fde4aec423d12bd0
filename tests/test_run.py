"""`python -m ls_vision.run` makes the models known to scripts that do not import the package."""
import subprocess
import sys

import pytest

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
