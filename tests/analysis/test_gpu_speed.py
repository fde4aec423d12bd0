"""The measurements of `ls-vision doctor --bench`, small and on the CPU."""
import json
import os
import subprocess
import sys

import pytest
import torch

from ls_vision.analysis import gpu_speed
from ls_vision.ops.backends import BACKEND_ENV

CPU = torch.device('cpu')


def test_models_and_report():
    contenders = (gpu_speed.Contender(gpu_speed.SWIN), gpu_speed.Contender('vil_ls_tiny', 'composite'))
    workload = gpu_speed.Workload(64, True, False, torch.float32, CPU, largest_batch=2)
    rows = gpu_speed.measure_models(workload, contenders, seconds=0.)
    assert [row['batch'] for row in rows] == [2, 2] and all(row['images_per_second'] > 0 for row in rows)
    assert BACKEND_ENV not in os.environ
    attention = gpu_speed.measure_attention(CPU, torch.float32, 0., side=8, batch=1, backends=('blocked', 'triton'))
    by_backend = {(row['backend'], row['what'], row['head_dim']): row for row in attention}
    assert by_backend['blocked', 'forward and backward', 32]['tflops'] > 0
    if not torch.cuda.is_available():
        assert "can't run here" in by_backend['triton', 'forward', 64]['reason']
    memory = gpu_speed.measure_memory(CPU, torch.float32, side=16)
    assert [row['tokens'] for row in memory] == [256, 256]
    text = gpu_speed.report(rows, attention, memory)
    assert '1.00 |' in text and 'vil_ls_tiny, composite' in text


def test_models_that_do_not_run_are_rows():
    workload = gpu_speed.Workload(0, False, False, torch.float32, CPU, largest_batch=1)
    row, = gpu_speed.measure_models(workload, (gpu_speed.Contender('vil_ls_tiny'),), seconds=0.)
    assert 'images_per_second' not in row and row['reason']


def test_option_needs_its_folder(tmp_path):
    command = [sys.executable, '-m', 'ls_vision', 'doctor', '--bench', str(tmp_path / 'none')]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and 'there is no such folder' in run.stderr and 'Traceback' not in run.stderr


@pytest.mark.slow
def test_option_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, '-m', 'ls_vision', 'doctor', '--bench', str(tmp_path), '--out', str(tmp_path / 'report')],
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if not json.loads((tmp_path / 'report.json').read_text())['facts']['GPUs']:
        assert 'there is no GPU' in run.stdout
