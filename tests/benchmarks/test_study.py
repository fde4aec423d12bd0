"""The study compares models of equal size and start, on pairs of digits that no stack of windows can compare."""
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))

import digit_pairs
import study

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('task', study.TASKS)
@pytest.mark.parametrize('variant', study.VARIANTS)
def test_variants_have_equally_many_parameters_and_the_same_start(task, variant):
    model, base = (study.start(task, v, seed=3) for v in (variant, study.BASE))
    assert study.count(model) == pytest.approx(study.count(base), rel=3e-3)
    own = model.state_dict()
    for name, value in base.state_dict().items():
        if name in own and own[name].shape == value.shape and 'to_dynamic_projection' not in name:
            assert torch.equal(own[name], value), name
    assert torch.equal(own['stages.0.patch_embed.proj.weight'], base.state_dict()['stages.0.patch_embed.proj.weight'])
    described = study.TASKS[task].model
    size = described['img_size']
    size = (size, size) if isinstance(size, int) else size
    images = study.with_coordinates(torch.randn(2, described['in_chans'] - 2, *size))
    assert model(images).shape == (2, described['num_classes'])


@pytest.mark.parametrize('window_size', [2, 4, 8])
def test_no_token_sees_both_digits(window_size):
    described = study.TASKS['pairs'].model
    model = study.LongShortViL(**{**study.MODEL, **described, 'window_size': window_size, 'rank': 0}).eval().double()
    images = study.with_coordinates(torch.randn(1, 1, digit_pairs.HEIGHT, digit_pairs.WIDTH)).double()
    left, right = images.clone(), images.clone()
    left[:, 0, :, :digit_pairs.HEIGHT] += 1
    right[:, 0, :, -digit_pairs.HEIGHT:] += 1
    with torch.no_grad():
        plain, by_left, by_right = (model.forward_features(x) for x in (images, left, right))
    sees_left, sees_right = ((x - plain).abs().amax(1) > 1e-9 for x in (by_left, by_right))
    assert sees_left.any() and sees_right.any() and not (sees_left & sees_right).any()
    assert digit_pairs.needed_columns(window_size, described['depths'][0], digit_columns=2) <= plain.shape[-1]


def test_pairs_are_repeatable_and_half_are_the_same():
    images, targets = digit_pairs.make_pairs(2000, seed=5)
    assert torch.equal(images, digit_pairs.make_pairs(2000, seed=5)[0])
    same, left, right = targets.unbind(1)
    assert torch.equal(same == 1, left == right)
    assert same.float().mean().item() == pytest.approx(.5, abs=.05)
    for digit in range(digit_pairs.DIGITS):  # either digit alone says nothing
        for place in left, right:
            assert same[place == digit].float().mean().item() == pytest.approx(.5, abs=.1)
    by_order = (left <= right) == (same == 1)  # a sum of parts decides: right - left + 0.5
    assert by_order.float().mean().item() == pytest.approx(.75, abs=.04)


def test_digits_are_all_different_in_every_place():
    places = digit_pairs.all_places()
    assert places.flatten(0, 1).flatten(1).unique(dim=0).shape[0] == places.shape[0] * places.shape[1]
    assert torch.equal(places.flatten(2).sum(2).std(1), torch.zeros(digit_pairs.DIGITS))  # no stroke is cut off


def test_fixed_projection_does_not_look_at_the_image():
    projection = study.FixedProjection(2, 3, 16)
    first, second = projection(torch.randn(2, 1 + 16, 8))  # with a global token, whose scores are not used
    assert torch.equal(first, second)
    torch.testing.assert_close(first[1:].t().reshape(2, 3, 16), projection.scores.detach())


def test_interval_is_that_of_students_t():
    assert study.interval([1., 2., 3.]) == '+2.00 (-0.48 to +4.48)'
    assert study.interval([1.]) == '—'


def test_interrupted_study_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    for split in ('train', 'val'):
        for label in range(10):
            folder = tmp_path / 'cifar10' / split / str(label)
            folder.mkdir(parents=True)
            Image.effect_noise((32, 32), 50).convert('RGB').save(folder / '0.png')
    argv = ['--variants', 'long-short', 'start std 1', 'rank 1', 'window 4', '--steps', '2', '--seeds', '0', '1',
            '--batch', '2', '--test-pairs', '8', '--threads', '1', '--data-dir', str(tmp_path / 'cifar10'),
            '--runs', str(tmp_path / 'runs'), '--out', str(tmp_path)]
    run_case, calls = study.run_case, []

    def stopped(args, case, seed):
        calls.append((*case, seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_case(args, case, seed)

    monkeypatch.setattr(study, 'run_case', stopped)
    with pytest.raises(SystemExit, match='Interrupted'):
        study.main(argv)
    study.main(argv)
    assert len(calls) == 16 + 1 and len(set(calls)) == 16  # each run once, but for the interrupted one
    page = tmp_path / 'study.md'
    page.write_text('above\n<!-- study -->\nold\n<!-- /study -->\nbelow\n')
    monkeypatch.setattr(study, 'PAGE', page)
    study.main([*argv, '--report', '--publish'])
    assert len(calls) == 17
    path, = tmp_path.glob('study_*.md')
    assert study.tables(json.loads(path.with_suffix('.json').read_text())['rows']) in page.read_text()
    table = path.read_text()
    assert table.count('| start std 1 | 2 |') == 2 and all(part in table for part in ('CIFAR-10', 'pairs of digits'))
    assert len(json.loads(path.with_suffix('.json').read_text())['rows']) == 16
    assert {p.name.split('_', 2)[2] for p in tmp_path.glob('*.png')} == {
        'cifar10_curves.png', 'pairs_curves.png', 'sweeps.png'}


def test_nothing_to_report(tmp_path):
    with pytest.raises(SystemExit, match=r'7x16_0\.002 holds no finished run'):
        study.main(['--report', '--steps', '7', '--runs', str(tmp_path)])
    with pytest.raises(SystemExit, match=r'does not exist: python -m ls_vision\.data\.cifar10'):
        study.main(['--tasks', 'cifar10', '--data-dir', str(tmp_path / 'none'), '--runs', str(tmp_path)])
