"""The tile-copying layer that benchmarks measure against gives what the layer gives."""
import sys
from pathlib import Path

import pytest
import torch

from ls_vision.layers import LongShortAttention2d

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
from contenders import TileCopying


@pytest.mark.parametrize('options', [
    dict(window_size=7, rank=8, num_global_tokens=1), dict(window_size=2, rank=4, rel_pos_bias=None),
    dict(window_size=4, rank=0, num_global_tokens=2)], ids=str)
def test_tile_copying_gives_the_same(options):
    layer = LongShortAttention2d(24, 3, **options)
    for feat_size in ((14, 14), (9, 11)):
        x = torch.randn(2, layer.num_global_tokens + feat_size[0] * feat_size[1], 24, requires_grad=True)
        actual, expected = TileCopying(layer)(x, feat_size), layer(x, feat_size)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(actual)
        grads = (torch.autograd.grad(out, [x, *layer.parameters()], weight) for out in (actual, expected))
        torch.testing.assert_close(next(grads), next(grads), rtol=1e-4, atol=1e-4)
