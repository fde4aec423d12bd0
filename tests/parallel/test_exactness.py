"""A split model is the unsplit one: outputs, gradients, training steps."""
import pytest
import torch
from ranks import run_ranks
from strip_cases import CVT, VIL, Case, run

CVT_LS = dict(model='cvt_ls_13', args=CVT)
CASES = {
    'one rank': Case(1, 37),
    'two ranks': Case(2, 37),
    'last strip of one pixel': Case(3, 65, strips=(32, 32, 1)),
    'unequal strips, windows of 7': Case(3, 171, strips=(56, 112, 3), args=dict(VIL, window_size=7)),
    'windows of 8, no global token': Case(3, 200, args=dict(VIL, window_size=8, num_global_tokens=0)),
    'windows of 1 and 2': Case(2, 37, args=dict(VIL, window_size=(1, 2))),
    'other options': Case(2, 37, args=dict(VIL, num_global_tokens=2, global_attention='pre', rel_pos_bias='unique')),
    'no summaries': Case(2, 37, args=dict(VIL, rank=0)),
    'no windows': Case(2, 37, model='cvt_ls_13', args=dict(CVT, window_size=0)),
    'steps': Case(2, 45, steps=3),
    'checkpointing': Case(3, 69, checkpointing=True, steps=2),
    'features': Case(2, 45, features_only=True),
    'features, checkpointing': Case(3, 69, features_only=True, checkpointing=True),
    'cvt': Case(2, 75, steps=3, **CVT_LS),
    'cvt, last strip of one pixel': Case(3, 129, strips=(32, 96, 1), **CVT_LS),
    'cvt, features': Case(3, 99, features_only=True, **CVT_LS),
    'cvt, checkpointing': Case(2, 75, checkpointing=True, **CVT_LS),
    'wide patches': Case(2, 75, model='cvt_ls_13', args=dict(CVT, patch_size=11)),
    'double': Case(3, 171, args=dict(VIL, window_size=7, num_global_tokens=1), dtype=torch.float64),
    'cvt, double': Case(3, 99, dtype=torch.float64, **CVT_LS),
}


FOUR = {
    'four ranks': Case(4, 69, steps=3),
    'four ranks, unequal strips, windows of 7': Case(4, 283, strips=(56, 112, 112, 3), args=dict(VIL, window_size=7)),
    'four ranks, windows of 8, checkpointing': Case(4, 250, args=dict(VIL, window_size=8), checkpointing=True),
    'four ranks, cvt': Case(4, 120, **CVT_LS),
}


@pytest.fixture(scope='module')
def results():
    return run_ranks(run, 3, CASES)


@pytest.mark.parametrize('name', CASES)
def test_equal_to_the_unsplit_model(results, name):
    check(results, name, CASES[name].ranks)


@pytest.mark.slow
def test_four_ranks():
    results = run_ranks(run, 4, FOUR)
    for name in FOUR:
        check(results, name, 4)


def check(results, name, num_ranks):
    for rank in range(num_ranks):
        errors = results[rank][name]
        print(name, rank, sorted(((e, t, k) for k, (e, t) in errors.items()), reverse=True)[:2])
        assert len(errors) > 40
        assert not {key: pair for key, pair in errors.items() if not pair[0] < pair[1]}
