"""Split models on two ranks: what they send, what they refuse, what they draw, and what they are used with."""
import contextlib
import os
import signal
import subprocess
import sys
import time

import failing_ranks
import pytest
import rank_checks
import torch
from ranks import run_ranks


@pytest.fixture(scope='module')
def results():
    return run_ranks(rank_checks.all_checks, 2)


@pytest.mark.parametrize('name', ['vil', 'cvt'])
def test_bytes_are_those_of_the_formulas(results, name):
    for result in results:
        forward, _, formulas = result['bytes_sent'][name]
        for key, numbers in formulas.items():
            assert forward.get(key, 0) == 4 * numbers, key


def test_gradients_pass_the_same_ways_back(results):
    (up, up_back, _), (down, down_back, _) = (result['bytes_sent']['vil'] for result in results)
    assert down_back['window halo'] == up['window halo'] and up_back['window halo'] == down['window halo']
    assert up_back['head'] == up['head']
    assert 0 < up_back['summaries'] < up['summaries'] and 0 < up_back['global tokens'] < up['global tokens']


@pytest.mark.parametrize('name, words', {
    'full attention': ['vil_ls_medium has stages with full attention', 'expected vil_ls_medium_linear'],
    'other library': ['model is Linear', 'expected a ViL-LS or CvT-LS'],
    'pooling': ["global_pool 'max'", "expected 'avg'"],
    'two dimensions': ['expected a DeviceMesh of one dimension'],
    'no mesh': ['mesh is 2'],
    'models': ['Ranks of one image have different models'],
    'too many ranks': ["171 rows can't be cut into 2 strips", 'at most 1'],
    'images': ['differ in sum of the bits'],
    'image sizes': ['differ in width: 40, 39'],
    'dimensions': ['shape [3, 171, 40]'],
    'twice': ['is split already'],
    'cut': ['[60, 111] rows, expected multiples of 56', 'split_image(images, mesh, 56)'],
    'dtype': ['differ in dtype: torch.float32, torch.float64'],
    'batch': ['differ in batch: 2, 1'],
    'mode': ['differ in training: 1, 0'],
    'gradients': ['differ in gradients: 1, 0'],
    'maps': ['differ in batch: 2, 1'],
    'attention maps': ['expected an unsplit one'],
}.items())
def test_refused_on_all_ranks(results, name, words):
    messages = [result['refusals'][name] for result in results]
    assert all(word in messages[0] for word in words), messages[0]
    assert len({m[:30] for m in messages}) == 1


def test_ranks_draw_the_same(results):
    first, second = (result['draws'] for result in results)
    for a, b in zip(first['outputs'], second['outputs']):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (first['outputs'][0] - first['outputs'][1]).abs().max() > 1e-3
    # forward, then recomputed: one list of both, the same on both ranks
    drawn = {}
    for number, mask in first['masks']:
        drawn.setdefault(number, []).append(mask)
    assert len(drawn) == first['modes'] > 0
    assert sum(len(masks) == 2 for masks in drawn.values()) >= len(drawn) // 2  # PyTorch stops early in a block
    assert all(torch.equal(masks[0], masks[-1]) for masks in drawn.values())
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in zip(first['masks'], second['masks']))


def test_copies_are_models_of_their_own(results):
    assert all(result['copy'] == (True, True, True) for result in results)


def test_model_that_changed_after_it_was_split(results):
    assert all(result['changed'] < 1e-5 for result in results)


def test_inference(results):
    assert all(value < 1e-5 for result in results for value in result['inference'].values())


def test_autocast(results):
    for split, whole in (result['half'] for result in results):
        assert split < 2 * whole + 1e-3


def test_ddp_over_all_ranks(results):
    assert all(result['ddp'] < 1e-5 for result in results)


def test_rank_that_hangs_is_named():
    (message, seconds), gone = run_ranks(failing_ranks.fail, 2, 'hangs', 2.)
    assert gone is None and seconds < 10
    assert message.startswith('Rank 0, one of the ranks [0, 1] of an image, got no ')
    assert 'rank 1 hung, or took too long, outside of any exchange' in message


@pytest.mark.slow
@pytest.mark.parametrize('how, blame', {
    'dies': "rank 1 died or can't be reached",
    'raises': 'rank 1 has failed with ValueError: a bad strip',
    'hangs': 'rank 1 hung, or took too long, outside of any exchange',
    'stops': "rank 1 died or can't be reached",
}.items())
def test_both_others_name_the_rank_that_fails(how, blame, tmp_path):
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '3',
         failing_ranks.__file__, how, '5', tmp_path], stderr=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    try:
        while len(list(tmp_path.glob('?'))) < 2 and time.monotonic() - start < 90:
            time.sleep(.2)
    finally:
        for pid in [process.pid, *(int(path.suffix[1:]) for path in tmp_path.glob('pid.*'))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    for rank in (0, 2):
        seconds, message = (tmp_path / str(rank)).read_text().split(' ', 1)
        assert blame in message and int(seconds) < 30


@pytest.mark.slow
def test_compiled():
    assert all(value < 1e-5 for value in run_ranks(rank_checks.compiled, 2))


@pytest.mark.slow
@pytest.mark.parametrize('over', ['data', 'all'])
@pytest.mark.parametrize('order', ['strips first', 'shards first'])
def test_fsdp(order, over):
    for errors in run_ranks(rank_checks.sharded, 4, order, over):
        assert {key: e for key, e in errors.items() if not e < 1e-10} == {}
