"""What the pictures show is what the model does."""
import pytest
import timm
import torch

import ls_vision  # noqa: F401
from ls_vision.analysis.pictures import collect_projection_maps, window_bounds
from ls_vision.layers import LongShortAttention2d


@pytest.mark.parametrize('query, window, keys', [
    ((5, 6), (4, 4, 8, 8), (2, 2, 10, 10)),
    ((0, 0), (0, 0, 4, 4), (0, 0, 6, 6)),  # the image's edge cuts the keys
    ((9, 9), (8, 8, 10, 10), (6, 6, 10, 10)),  # and an incomplete window
])
def test_window_bounds(query, window, keys):
    assert window_bounds(query, feat_size=(10, 10), window_size=4) == (window, keys)


@pytest.mark.parametrize('window_size', [1, 2, 3, 4])
def test_window_bounds_are_what_the_layer_computes(window_size):
    """A query's output has a gradient at exactly the tokens of the drawn box."""
    torch.manual_seed(0)
    height, width = 7, 9
    layer = LongShortAttention2d(8, num_heads=2, window_size=window_size, rank=0, rel_pos_bias='unique')
    tokens = torch.randn(1, height * width, 8, requires_grad=True)
    for query in ((0, 0), (3, 4), (6, 8)):
        out = layer(tokens, (height, width))[0, query[0] * width + query[1]]
        gradient, = torch.autograd.grad(out.square().sum(), tokens)
        touched = gradient[0].abs().sum(-1).reshape(height, width) > 0
        top, left, bottom, right = window_bounds(query, (height, width), window_size)[1]
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(touched, expected)


def test_maps_are_distributions_over_the_grid():
    model = timm.create_model('vil_ls_tiny', img_size=64, num_classes=3)
    layers = collect_projection_maps(model, torch.randn(1, 3, 64, 96))
    assert [tuple(layer.projection.shape) for layer in layers] == [(1, 8, 16, 24), (3, 8, 8, 12)]
    for layer in layers:
        torch.testing.assert_close(layer.projection.sum((-2, -1)), torch.ones(layer.projection.shape[:2]))


def test_model_without_maps():
    assert collect_projection_maps(timm.create_model('test_vit2'), torch.randn(1, 3, 64, 64)) == []
