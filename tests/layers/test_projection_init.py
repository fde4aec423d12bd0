"""The start of the dynamic projection: the spread of its scores, orthogonal weights, models, wrong values."""
import pytest
import timm
import torch
import torch.nn.functional as F

from ls_vision.analysis.record import record
from ls_vision.analysis.summaries import use_of_summaries
from ls_vision.layers import LongShortAttention2d

pytestmark = pytest.mark.usefixtures('one_thread')


def scores_of(layer, x, feat_size):
    """(B, h, r, N) of normalised tokens."""
    return layer._project(F.layer_norm(x, x.shape[2:]), feat_size)[4]


@pytest.mark.parametrize('conv_projection', [False, True])
@pytest.mark.parametrize('start, deviation', [(.5, .5), (2, 2.), ('orthogonal', 1.)])
def test_scores_have_the_deviation(conv_projection, start, deviation):
    torch.manual_seed(0)
    layer = LongShortAttention2d(
        64, 4, rank=16, rel_pos_bias=None, conv_projection=conv_projection, projection_init=start)
    with torch.no_grad():
        scores = scores_of(layer, torch.randn(8, 20 * 20, 64), (20, 20))
    assert scores.std(-1).mean().item() == pytest.approx(deviation, rel=.1)  # less at the border of a convolution


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthogonal_weights_are_those_of_a_head(dtype):
    layer = LongShortAttention2d(32, 2, rank=8, projection_init='orthogonal', dtype=dtype)
    for rows in layer.to_dynamic_projection.weight.detach().float().unflatten(0, (2, 8)):
        torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'cvt_ls_13'])
def test_models_keep_the_start_when_they_initialise_all_weights(name):
    with torch.device('meta'):
        model = timm.create_model(name, projection_init=1., num_classes=0)
    model.to_empty(device='cpu').init_weights()
    fresh = timm.create_model(name, projection_init=1., num_classes=0)
    for some in model, fresh:
        layers = [m for m in some.modules() if isinstance(m, LongShortAttention2d)]
        assert layers
        for layer in layers:
            linear = layer.to_dynamic_projection or layer.scores.to_dynamic_projection
            expected = layer.dim ** -.5 / (1 if layer.qkv is not None else 3)
            assert linear.weight.std().item() == pytest.approx(expected, rel=.1)
            assert not linear.bias.any()
            assert layer.proj.weight.std().item() == pytest.approx(.02, rel=.1)


def test_summaries_differ_from_the_start():
    image = torch.randn(1, 3, 64, 64)
    ranks = {}
    for start in (None, 1., 'orthogonal'):
        torch.manual_seed(0)
        rows = use_of_summaries(record(timm.create_model('vil_ls_tiny', projection_init=start).eval(), image))
        ranks[start] = sum(row.maps_rank for row in rows[:4]) / 4
    assert ranks[None] < 1.5 < 3 < min(ranks[1.], ranks['orthogonal'])


@pytest.mark.parametrize('start', [0, -1., float('nan'), float('inf'), 10 ** 400, True, 'orthogonl', [1.]])
def test_wrong_start(start):
    with pytest.raises(ValueError, match=r"projection_init is .*, expected None, 'orthogonal', or .* above 0"):
        timm.create_model('vil_ls_tiny', projection_init=start)


def test_nothing_to_start():
    with pytest.raises(ValueError, match=r'projection_init is 1\.0, expected None with rank 0'):
        LongShortAttention2d(32, 2, rank=0, projection_init=1.)
    for name in ('vil_ls_tiny', 'cvt_ls_13'):
        with pytest.raises(ValueError, match=r'projection_init is 1\.0, expected None where no stage has'):
            timm.create_model(name, attn_types='full', projection_init=1.)
        with pytest.raises(ValueError, match='no stage has a dynamic projection'):
            timm.create_model(name, rank=0, projection_init='bad')
    model = timm.create_model('vil_ls_tiny', attn_types='long-short', rank=[8, 0, 8, 8], projection_init=1.)
    assert [stage.blocks[0].attn.rank for stage in model.stages] == [8, 0, 8, 8]


def test_no_more_orthogonal_summaries_than_channels():
    with pytest.raises(ValueError, match=r"'orthogonal', expected a rank of 32 \(dim\) or less, got 33"):
        LongShortAttention2d(32, 2, rank=33, projection_init='orthogonal')
