"""Measurements in fresh processes: out of memory, killed, and resumed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ls_vision.analysis import scale
from ls_vision.analysis.scale import Results, plan
from ls_vision.analysis.worker import Point, Settings, visit
from ls_vision.runtime.errors import UserError

SETTINGS = Settings(device='cpu', dtype='float32', threads=1, seconds=0.01, memory_limit=2 ** 32)


def command(out, *args):
    return [
        sys.executable, '-m', 'ls_vision', 'scale', 'test_vit2', 'vil_ls_tiny', '--img-size', '64', '96x64', '--mode',
        'inference', '--threads', '1', '--seconds', '0.01', '--rounds', '2', '--out', str(out), *args]


def rows_of(path):
    return json.loads(path.read_text())['rows'] if path.exists() else []


def visits_of(path):
    return sum(len(row['visits']) for row in rows_of(path))


def test_plan_has_small_images_first():
    points = plan(['a', 'b', 'a'], [(96, 64), (64, 64)], [1], ['inference', 'training'])
    assert len(points) == 8
    assert [p.img_size for p in points] == [(64, 64)] * 4 + [(96, 64)] * 4


def test_training_takes_more_memory_than_inference():
    inference, training = (
        visit(Point('vil_ls_tiny', (64, 64), 1, mode), SETTINGS) for mode in ('inference', 'training'))
    assert inference['status'] == training['status'] == 'ok'
    weights = 6.7e6 * 4
    assert weights < inference['memory'] < 4 * weights < training['memory']  # gradients, two moments of AdamW
    assert all(s > 0 for s in inference['seconds'])


def test_out_of_memory_is_a_result():
    """Full attention on 65,536 tokens, whose logits take 50 GB."""
    assert visit(Point('vil_full_medium', (1024, 1024), 1, 'inference'), SETTINGS) == dict(status='out of memory')


def test_failure_is_a_result():
    result = visit(Point('vil_ls_tiny', (2, 2), 1, 'inference'), SETTINGS)
    assert result['status'] == 'failed' and 'smaller than a patch' in result['message']


def test_killed_and_resumed(tmp_path):
    """No point is lost and none measured twice."""
    path = tmp_path / 'results.json'
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.DEVNULL, start_new_session=True)
    while visits_of(path) < 3:
        assert process.poll() is None, 'ended before it was killed'
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = rows_of(path)
    assert 3 <= visits_of(path) < 8

    again = subprocess.run(command(tmp_path), capture_output=True, text=True)
    assert again.returncode == 2 and 'already has results; continue with --resume' in again.stderr
    done = subprocess.run(command(tmp_path, '--resume'), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = rows_of(path)
    keys = [(row['model'], tuple(row['img_size']), row['mode']) for row in after]
    assert len(keys) == len(set(keys)) == 4
    assert all(len(row['visits']) == 2 and row['status'] == 'ok' for row in after)
    for old, new in zip(before, after):  # what was there is still there
        assert new['visits'][:len(old['visits'])] == old['visits']
    assert all((tmp_path / name).stat().st_size > 0 for name in ('report.html', 'scaling.png', 'summary.md'))
    assert 'vil_ls_tiny' in done.stdout


def test_interrupted(tmp_path):
    """Ctrl-C goes to all processes of the terminal; results are kept, and no process keeps running."""
    path = tmp_path / 'results.json'
    process = subprocess.Popen(  # as from a terminal: processes in the background ignore the signal
        command(tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while visits_of(path) < 1:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert 'continue with --resume' in error and 'Traceback' not in error
    assert visits_of(path) >= 1
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_results_of_another_machine_are_not_continued(tmp_path):
    path = tmp_path / 'results.json'
    results = Results.create(path, SETTINGS, resume=False)
    results.machine['torch'] = '1.0'
    results.save()
    with pytest.raises(UserError, match=r'was measured with torch 1\.0, now it is'):
        Results.create(path, SETTINGS, resume=True)
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match='does not hold results of'):
        Results.create(path, SETTINGS, resume=True)


def test_failed_points_are_tried_again(tmp_path):
    results = Results.create(tmp_path / 'results.json', SETTINGS, resume=False)
    points = [Point(name, (64, 64), 1, 'inference') for name in 'abc']
    costs = dict(params=1, macs=1)
    results.add(points[0], dict(status='failed', message='no'), costs)
    results.add(points[1], dict(status='out of memory'), costs)
    results.add(points[2], dict(status='ok', seconds=[1., 3.], memory=5), costs)
    assert [scale._is_missing(results, point, 0) for point in points] == [True, False, False]
    assert [scale._is_missing(results, point, 1) for point in points] == [True, False, True]
    assert results.find(points[2])['latency'] == 2.
