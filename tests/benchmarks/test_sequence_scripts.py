"""ListOps by its rules, the novels' bytes, the recipes, and both training scripts, interrupted and resumed."""
import json
import random
import runpy
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import listops  # noqa: E402

from ls_vision.data import austen  # noqa: E402
from ls_vision.models import language_model, sequence_classifier  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


def test_values_lengths_and_tokens_of_trees():
    tree = (3, [4, (1, [9, 2]), (2, [1, 8, 2, 3])])  # [SM 4 [MAX 9 2 ] [MED 1 8 2 3 ] ]
    assert listops.value_of(tree) == (4 + 9 + 2) % 10  # the median 2.5 is truncated
    assert listops.length_of(tree) == 7 + 2 * 3
    assert listops.tokens_of(tree, True) == [14, 5, 12, 10, 3, 15, 13, 2, 9, 3, 4, 15, 15]
    assert listops.tokens_of(tree, False) == [14, 5, 12, 10, 3, 13, 2, 9, 3, 4]
    assert listops.value_of((0, [3, 7])) == 3


def test_samples_are_different_and_of_their_length():
    samples = listops.make_samples(50, 1, True, 20, 60)
    assert len({tuple(tokens) for tokens, _ in samples}) == 50 and samples == listops.make_samples(50, 1, True, 20, 60)
    assert all(20 < len(tokens) < 60 and 0 <= label <= 9 for tokens, label in samples)
    tokens = samples[0][0]
    inserted, deleted = (listops.edit(tokens, n, random.Random(0)) for n in (4, -4))
    assert [t for t in inserted if t != listops.UNKNOWN] == tokens and len(deleted) == len(tokens) - 4
    assert listops.edit(tokens, -len(tokens) - 5, random.Random(0)) == tokens[:1]  # shorter than what is to be deleted


def test_first_operator_alone():
    training = [([11, 5], 0), ([11, 6], 0), ([11, 7], 3), ([12, 5], 9)]
    assert listops.first_operator_alone(training, [([11, 9], 0), ([11, 1], 3), ([12, 2], 9), ([13, 2], 9)]) == 50.


def test_spread_and_deviations_only_of_several_seeds():
    def row(seed, accuracy):
        changed = {str(n * sign): 1. for n in listops.EDITS for sign in (1, -1)}
        return dict(variant='full', seed=seed, accuracy=accuracy, first_operator_alone=33., seconds=1., changed=changed)

    one, two = (listops.markdown(rows) for rows in ([row(0, 36.)], [row(0, 35.), row(1, 37.)]))
    assert '| full | 1 | 36.00 | +3.00 | -0.40 |' in one and 'nan' not in one
    assert '| full | 2 | 36.00 ± 1.41 | +3.00 (+2.1 sd) | -0.40 (-0.3 sd) |' in two
    assert all('on the same trees: 33.0 %' in table and '36.4 %' in table for table in (one, two))


def test_every_variant_trains_and_a_finished_run_is_not_repeated(tmp_path, monkeypatch, capsys):
    argv = ['listops.py', '--steps', '3', '--train', '20', '--test', '6', '--batch', '2', '--seeds', '0', '1',
            '--shortest', '20', '--longest', '60', '--threads', '1', '--runs', str(tmp_path / 'runs'),
            '--out', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', argv)
    listops.main()
    table = next(tmp_path.glob('listops_closing_20-60_*.md')).read_text()
    assert all(f'| {variant} | 2 |' in table for variant in listops.VARIANTS)
    files = sorted((tmp_path / 'runs').glob('*_closing_20-60_3_*.json'))
    assert len(files) == 2 * len(listops.VARIANTS)
    before = [f.stat().st_mtime_ns for f in files]
    monkeypatch.setattr(sys, 'argv', [*argv, '--report'])
    listops.main()
    assert [f.stat().st_mtime_ns for f in files] == before


def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    from training_runs import train

    def run(path, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99 ** step)

        def loss_of(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.full((1, 3), step / 100)) - 1).square().mean()

        return train(path, model, optimizer, scheduler, loss_of, lambda: dict(weight=model.weight.tolist()), 250)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'a', stop_at=170)
    a, b = run(tmp_path / 'a'), run(tmp_path / 'b')
    assert a['weight'] == b['weight'] and a['losses'] == b['losses']
    assert json.loads((tmp_path / 'a.json').read_text())['weight'] == a['weight']


def test_characters(tmp_path, monkeypatch):
    data = tmp_path / 'austen'
    data.mkdir()
    rest = austen.NUM_BYTES
    for name in austen.NOVELS:
        size = min(rest, 800_000)
        (data / f'{name}.txt').write_bytes((b'It is a truth universally acknowledged. ' * 20_000)[:size])
        rest -= size
    monkeypatch.setattr(sys, 'argv', [
        'characters.py', '--data-dir', str(data), '--steps', '3', '--batch', '2', '--segment', '64', '--seeds', '0',
        '--evaluate', '300', '--memory', '0', '64', '--threads', '1', '--runs', str(tmp_path / 'runs'),
        '--out', str(tmp_path)])
    runpy.run_path(str(ROOT / 'benchmarks' / 'characters.py'), run_name='__main__')
    table = next(tmp_path.glob('characters_*.md')).read_text()
    assert all(f'| {variant} | 1 |' in table for variant in ('long-short', 'window only', 'full'))


def test_lines_of_a_novel():
    strings = [b'EMMA', b'', b'by Jane Austen \xe2\x80\x94']
    objects = b'X\n' + b''.join(b'\x00\x04\x00\x09' + len(s).to_bytes(4, 'big') + s for s in strings)
    data = b'\x00\x00\x00\x01' + zlib.compress(objects) + b'the next one'
    assert austen.read_novel(data, 4) == b'\n'.join(strings)
    with pytest.raises(austen.FetchError, match=r'does not hold the novels: python -m ls_vision\.data\.austen'):
        austen.read_bytes('nowhere')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'sequence').glob('*.yaml')), ids=lambda p: p.stem)
def test_recipes_build_their_model(path):
    model = yaml.safe_load(path.read_text())['model']
    kind = model.pop('class', None)
    with torch.device('meta'):
        built = getattr(sequence_classifier, kind)(**model) if kind else language_model.LanguageModel(**model)
    published = {
        'lra_listops': 249_418, 'lra_text': 379_458, 'lra_retrieval': 404_034, 'enwik8_base': 44_294_448,
        'enwik8_large': 110_576_064, 'text8_base': 44_204_160}
    assert sum(p.numel() for p in built.parameters()) == published[path.stem]
