"""What summaries are worth: known cases, and the rows of models."""
import json

import pytest
import skimage.data
import timm
import torch
from PIL import Image

import ls_vision  # noqa: F401, registers the models
from ls_vision.analysis.record import record
from ls_vision.analysis.summaries import effective_rank, mean_overlap, table, use_of_summaries
from ls_vision.cli import main

TOY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=2, num_classes=10)


def test_equal_and_disjoint_vectors():
    one = torch.rand(1, 20)
    assert effective_rank(one.repeat(5, 1)) == pytest.approx(1.) and mean_overlap(one.repeat(5, 1)) == pytest.approx(1.)
    disjoint = torch.eye(5).repeat_interleave(4, dim=1) * torch.arange(1, 6)[:, None]
    assert effective_rank(disjoint) == pytest.approx(5.) and mean_overlap(disjoint) == pytest.approx(0.)
    assert effective_rank(torch.zeros(3, 4)) == 0. and effective_rank(torch.eye(3)[:, :2]) == pytest.approx(2.)
    pairs = torch.eye(2, 20).repeat(2, 1)  # four vectors in two directions
    assert effective_rank(pairs) == pytest.approx(2.) and mean_overlap(pairs) == pytest.approx(1 / 3)
    assert effective_rank(one) == pytest.approx(1.) and mean_overlap(one) == 1.


def test_effective_rank_is_that_of_the_eigenvalues():
    vectors = torch.randn(6, 9, dtype=torch.float64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.t())
    assert effective_rank(vectors) == pytest.approx(float(values.sum() ** 2 / values.square().sum()))


@pytest.mark.parametrize('name,kwargs', [
    ('vil_ls_tiny', dict(rank=4)),
    ('vil_ls_tiny_linear', dict(rank=0)),
    ('cvt_ls_13', dict(rank=3, embed_dims=(16, 32, 48), depths=(1, 1, 1))),
])
def test_rows_of_models(name, kwargs):
    model = timm.create_model(name, **{**TOY, **kwargs}).eval()
    image = torch.randn(1, 3, 68, 100)  # grids that windows do not divide
    records = record(model, image)
    rows = use_of_summaries(records)
    assert len(rows) == 2 * len(records)
    for row in rows:
        assert row.share + row.window_share + row.global_share == pytest.approx(1., abs=1e-5)
        if row.rank == 0:
            assert row.maps_rank == row.keys_rank == row.share == 0.
        else:
            assert 1. <= row.maps_rank <= row.rank and 1. <= row.keys_rank <= row.rank and 0. <= row.overlap <= 1.
            # near zero at the start, the scores make all maps nearly uniform
            assert row.maps_rank < 1.3 and row.overlap > .85
    assert any(row.rank for row in rows) == (kwargs['rank'] > 0)
    assert f'stages.0.blocks.0 |    1 | {kwargs["rank"]:3d}' in table(rows)


def test_shares_are_the_mean_over_tokens():
    model = timm.create_model('vil_ls_tiny', rank=4, **TOY).eval()
    first = record(model, torch.randn(1, 3, 36, 44), stage=0)[0]
    H, W = first.feat_size
    tokens = torch.stack([first.at(row, col).shares for row in range(H) for col in range(W)])
    torch.testing.assert_close(first.mean_shares, tokens.mean(0))


def test_command(tmp_path, capsys):
    picture, out = tmp_path / 'cat.png', tmp_path / 'rows.json'
    Image.fromarray(skimage.data.chelsea()).save(picture)
    kwargs = [f'{name}={list(value) if isinstance(value, tuple) else value}' for name, value in TOY.items()]
    main([
        'attention', str(picture), '--model', 'vil_ls_tiny', '--model-kwargs', *kwargs, 'rank=4', '--img-size', '64x96',
        '--summary', '--out', str(out)])
    assert '| stages.3.blocks.0 |' in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 8 and rows[0]['rank'] == 4 and rows[-1]['rank'] == 0


@pytest.mark.parametrize('option', [['--pixel', '1', '1'], ['--stage', '0'], ['--block', '1']], ids=lambda x: x[0])
def test_choices_of_the_sheet_are_not_for_the_table(option, capsys):
    with pytest.raises(SystemExit):
        main(['attention', 'cat.png', '--summary', *option])
    assert capsys.readouterr().err.startswith(f'error: {option[0]}: chooses what the sheet shows')
