"""The benchmark of memory measures a real step, and says where memory ran out."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def measure(tmp_path, *args):
    """The rows that the benchmark writes."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, 'benchmarks/detection_memory.py', '--out', str(tmp_path), '--steps', '1', *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(next(tmp_path.glob('*.json')).read_text())['rows']


def test_step_and_out_of_memory(tmp_path):
    fits, does_not = measure(
        tmp_path, '--models', 'vil_ls_tiny_linear', '--sizes', '96,128', '4096,4096', '--memory-limit', '1.5')
    assert fits['seconds'] > 0 and 1e8 < fits['memory'] < 2e9
    assert does_not['error'] == 'out of memory'


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_2048_pixels_fit_in_16_gigabytes_where_full_attention_does_not(tmp_path):
    linear, full = measure(
        tmp_path, '--models', 'vil_ls_medium_linear', 'vil_full_medium', '--sizes', '2048,2048', '--detector', 'fcos',
        '--grad-checkpointing', '--memory-limit', '16')
    assert linear['memory'] < 16 * 2 ** 30
    assert full['error'] == 'out of memory'
