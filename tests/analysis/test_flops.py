"""The counters agree with each other, with the paper's and with timm's published figures."""
import pytest
import timm
import torch
from torch import nn

from ls_vision.analysis import flops
from ls_vision.analysis.flops import count
from ls_vision.analysis.formulas import PARTS, count_by_formula
from ls_vision.analysis.zoo import own_models
from ls_vision.layers import FullAttention2d, LongShortAttention2d
from ls_vision.runtime.errors import UserError

PUBLISHED_GMAC = {  # of the long-short models in the specification, of timm's in their papers
    ('vil_ls_medium', 224): 8.69,
    ('vil_ls_base', 224): 13.34,
    ('vil_ls_medium_384', 384): 28.64,
    ('cvt_ls_13', 224): 4.94,
    ('cvt_ls_17', 224): 9.76,
    ('cvt_ls_21', 224): 7.86,
    ('cvt_ls_21s', 224): 11.19,
    ('cvt_ls_21_384', 384): 23.83,
    ('cvt_ls_21_448', 448): 34.07,
    ('cvt_13', 224): 6.64,
    ('cvt_21', 224): 10.10,
    ('swin_small_patch4_window7_224', 224): 8.7,
    ('swin_tiny_patch4_window7_224', 224): 4.5,
    ('vit_small_patch16_224', 224): 4.6,
}


FAST = (
    'vil_ls_medium', 'vil_ls_medium_384', 'cvt_ls_13', 'cvt_13', 'swin_small_patch4_window7_224',
    'vit_small_patch16_224')


@pytest.mark.parametrize('name, size', [
    pytest.param(*key, marks=() if key[0] in FAST else pytest.mark.slow) for key in PUBLISHED_GMAC])
def test_published_counts(name, size):
    result = count(name, (size, size))
    assert result.macs / 1e9 == pytest.approx(PUBLISHED_GMAC[name, size], rel=0.01)
    assert result.macs == result.counters['torch'] == result.counters['formula']
    assert sum(result.parts.values()) == pytest.approx(result.macs, abs=len(PARTS))
    assert sum(result.stages.values()) == result.macs


@pytest.mark.slow
@pytest.mark.parametrize('size', [(224, 224), (384, 384), (640, 480), (1024, 1024)])
@pytest.mark.parametrize('name', own_models())
def test_counters_agree(name, size):
    counters = count(name, size).counters
    assert set(counters) == {'fvcore', 'torch', 'formula'}
    assert max(counters.values()) - min(counters.values()) <= 0.01 * max(counters.values())


def test_large_image_takes_no_memory():
    """Full attention at 4096 px would need terabytes."""
    result = count('vil_full_medium', (4096, 4096))
    assert result.parts['full attention'] > 0.9 * result.macs > 1e14


@pytest.mark.parametrize('layer', [
    LongShortAttention2d(32, num_heads=2, window_size=4, rank=3, num_global_tokens=2),
    LongShortAttention2d(32, num_heads=2, window_size=0, rank=3, rel_pos_bias=None),
    LongShortAttention2d(32, num_heads=2, window_size=3, rank=0),
    LongShortAttention2d(32, num_heads=2, window_size=2, rank=3, rel_pos_bias=None, conv_projection=True),
    FullAttention2d(32, num_heads=2, num_global_tokens=2),
])
def test_formula_of_a_layer(layer):
    """Against PyTorch's counter, on a grid that windows do not divide."""
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, (9, 7))

    model = Alone().to('meta')
    tokens = torch.empty(2, layer.num_global_tokens + 63, 32, device='meta')
    with torch.no_grad():
        by_module = flops._count_by_module(model, tokens)
        assert sum(count_by_formula(model, tokens).values()) == sum(sum(ops.values()) for ops in by_module.values()) > 0


@pytest.mark.parametrize('name', [
    'resnet18', 'convnext_atto', 'efficientvit_m0', 'xcit_nano_12_p16_224'])
def test_any_timm_model(name):
    result = count(name, (224, 224))
    assert result.macs > 0
    assert (result.counters['formula'] is None) == bool(result.without_formula)


def test_unknown_operator_is_an_error(monkeypatch):
    monkeypatch.setattr(flops, 'NEGLIGIBLE', flops.NEGLIGIBLE - {'aten::gelu'})
    with pytest.raises(UserError, match='cannot be counted: aten::gelu'):
        count('vil_ls_tiny', (64, 64))


def test_disagreement_is_an_error(monkeypatch):
    monkeypatch.setitem(flops.HANDLES, 'aten::matmul', lambda inputs, outputs: 0)
    with pytest.raises(UserError, match=r'disagree by more than 1%: fvcore [\d,]+, torch [\d,]+, formula [\d,]+'):
        count('vil_ls_tiny', (64, 64))


def test_counting_leaves_tracing_as_it_was():
    count('vil_ls_tiny', (64, 64))
    assert not torch.jit.is_tracing()
    assert timm.create_model('vil_ls_tiny')(torch.randn(1, 3, 64, 64)).isfinite().all()
