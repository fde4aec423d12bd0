"""The comparison of backbones trains every run past both limits, evaluates it on the way, and reports what it found."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))

import detection_comparison as comparison

pytestmark = pytest.mark.usefixtures('one_thread')


def row(variant, seed, *points):
    points = [dict(updates=u, seconds=s, AP=0., AP50=a, AR=0.) for u, s, a in points]
    return dict(variant=variant, seed=seed, parameters=10 ** 6, points=points, whole={'1000': dict(AP50=.1)}, losses=[])


def test_equal_updates_and_equal_time_are_different_columns():
    rows = [row('long-short', seed, (100, 40., .2 + seed / 10), (500, 240.5, .4)) for seed in (0, 1)]
    rows += [row('Swin-T', seed, (95, 240.2, .3), (100, 250., .5 + seed / 10)) for seed in (0, 1)]
    ours, swin = comparison.tables(rows, 100, 240.).splitlines()[2:]
    assert ours.startswith('| long-short | 1.0 | 2 | 0.250 ± 0.071 |  | 500 | 0.400 ± 0.000 |  |')
    assert swin.startswith('| Swin-T | 1.0 | 2 | 0.550 ± 0.071 | +0.300 (+0.300 to +0.300) | 95 | 0.300 ± 0.000 | -0.1')


def test_runs_are_trained_drawn_and_not_repeated(deepforest, tmp_path, monkeypatch, capsys):
    photograph = str(deepforest / 'transfer')
    small = dict(train_annotations=photograph, val_annotations=photograph, crop_size=64, tile_overlap=32)
    monkeypatch.setattr(comparison, 'CONFIG', {**comparison.CONFIG, **small})
    argv = ['--variants', 'long-short', 'window only', '--seeds', '3', '--updates', '1', '2', '--seconds', '.01', '.2',
            '--threads', '1', '--runs', str(tmp_path / 'runs'), '--out', str(tmp_path)]
    comparison.main(argv)
    result, = tmp_path.glob('*.json')
    rows = json.loads(result.read_text())['rows']
    for found in rows:
        assert [p['updates'] for p in found['points']][:2] == [1, 2]
        assert found['points'][-1]['seconds'] >= .2 and len(found['losses']) == found['points'][-1]['updates']
    assert rows[0]['losses'] != rows[1]['losses']  # another backbone
    assert result.with_suffix('.png').stat().st_size > 5000

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').rglob('*.json')}
    comparison.main([*argv, '--report'])
    assert len(before) == 2 and before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(SystemExit, match='no finished run'):
        comparison.main([*argv, '--report', '--runs', str(tmp_path / 'other')])
