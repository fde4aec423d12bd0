"""The report on this machine: what it holds, and that a wrong or dying backend fails it."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ls_vision.analysis import doctor
from ls_vision.analysis.commands.doctor import describe
from ls_vision.ops.backends import BACKENDS
from ls_vision.ops.window import square_window

CPU = torch.device('cpu')
PROBLEM = doctor.Problem(16, square_window(2), 3, True)


def test_problems_are_those_of_the_models():
    problems = doctor.zoo_problems()
    assert doctor.Problem(32, square_window(7), 9, True) in problems  # first stage of the published ViL-LS
    assert doctor.Problem(80, square_window(2), 4, False) in problems


@pytest.mark.parametrize('dtype', doctor.probe.DTYPES)
def test_right_backend(dtype):
    assert doctor.compare('blocked', PROBLEM, dtype, CPU).startswith('largest error')


def test_wrong_gradient_is_found(monkeypatch):
    def wrong(*args):
        grads = BACKENDS_BEFORE.backward(*args)
        return (*grads[:3], grads[3] * 1.01)

    BACKENDS_BEFORE = BACKENDS['blocked']
    monkeypatch.setitem(BACKENDS, 'blocked', BACKENDS_BEFORE._replace(backward=wrong))
    with pytest.raises(AssertionError, match='bias: an error of'):
        doctor.compare('blocked', PROBLEM, torch.float32, CPU)


def test_backend_that_cannot_run_here():
    if not torch.cuda.is_available():
        with pytest.raises(doctor.Skipped, match='CUDA tensors'):
            doctor.compare('triton', PROBLEM, torch.float32, CPU)


def test_sums_are_those_of_the_models():
    assert {doctor.probe.Sums(32, 8, 2, False), doctor.probe.Sums(32, 1, 1, True)} <= set(doctor.zoo_sums())
    if not torch.cuda.is_available():
        with pytest.raises(doctor.Skipped, match='CUDA tensors'):
            doctor.try_sums(doctor.zoo_sums()[0], torch.float32, CPU)


def test_failures_come_first_in_the_text():
    checks = [dict(check='a', outcome='ok', detail='fine'), dict(check='b', outcome='failed', detail='wrong')]
    text = describe({'facts': {'torch': '2.14'}, 'checks': checks})
    assert text.splitlines() == ['torch: 2.14', '', '1 failed, 0 skipped, 1 ok', 'failed: b: wrong', 'ok: a: fine']


@pytest.mark.slow
def test_command(tmp_path):
    run = subprocess.run(
        [sys.executable, '-m', 'ls_vision', 'doctor', '--out', str(tmp_path / 'report')],
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['facts']['torch'] == torch.__version__
    assert {check['outcome'] for check in report['checks']} <= {'ok', 'skipped'}
    assert run.stdout == (tmp_path / 'report.txt').read_text()


@pytest.mark.slow
def test_killed_check(tmp_path):
    """A check that ends its process, as an illegal memory access does, fails the report."""
    with subprocess.Popen(
            [sys.executable, '-m', 'ls_vision', 'doctor'], stdout=subprocess.PIPE, text=True) as process:
        child = None
        while child is None:
            time.sleep(.5)
            children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
            child = next(iter(children.stdout.split()), None)
        time.sleep(6)
        os.kill(int(child), signal.SIGKILL)
        text, _ = process.communicate()
    assert process.returncode == 1
    assert 'ended the process with code -9' in text
