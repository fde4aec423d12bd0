"""Full attention: its position bias, which inference makes once, is always that of the present weights."""
import copy
import io
from unittest import mock

import pytest
import torch
from torch import nn

from ls_vision.layers import FullAttention2d, cpu, full_attention


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return FullAttention2d(32, 4, feat_size=(5, 4), num_global_tokens=1).eval()


def change_by_optimizer(layer):
    layer.g2l_relative_position_bias.grad = torch.ones_like(layer.g2l_relative_position_bias)
    torch.optim.SGD([layer.g2l_relative_position_bias], lr=1.).step()


def change_by_data(layer):
    layer.local_relative_position_bias_table.data.mul_(3)


def change_by_load(layer):
    layer.load_state_dict({k: v + .5 for k, v in layer.state_dict().items()})


def change_by_assignment(layer):
    layer.g2g_relative_position_bias = nn.Parameter(torch.ones_like(layer.g2g_relative_position_bias))


def change_by_size(layer):
    layer.set_feat_size((4, 5))


def change_by_dtype(layer):
    layer.double()


@pytest.mark.parametrize('change', [
    change_by_optimizer, change_by_data, change_by_load, change_by_assignment, change_by_size, change_by_dtype])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_kept_bias_is_never_stale(layer, change, mode):
    x = torch.randn(2, 21, 32)
    with mode():
        before = layer(x, (5, 4))
    change(layer)
    x = x.to(layer.proj.weight.dtype)
    expected = layer(x, (5, 4)).detach()  # with gradients nothing is kept
    with mode():
        after = layer(x, (5, 4))
    assert not torch.allclose(before.to(after.dtype), after) or change is change_by_dtype or change is change_by_size
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


def test_bias_is_made_once_per_grid(layer):
    x = torch.randn(2, 21, 32)
    with mock.patch.object(full_attention, 'grid_bias', wraps=full_attention.grid_bias) as made, torch.no_grad():
        for feat_size, calls in [((5, 4), 1), ((5, 4), 1), ((4, 5), 2), ((4, 5), 2), ((5, 4), 3)]:
            layer(x, feat_size)
            assert made.call_count == calls


def test_kept_bias_is_bounded_and_in_no_copy(layer, monkeypatch):
    x = torch.randn(1, 21, 32)
    with torch.no_grad():
        layer(x, (5, 4))
    assert layer in cpu._kept and copy.deepcopy(layer) not in cpu._kept
    file = io.BytesIO()
    torch.save(layer, file)
    weights = sum(p.nbytes for p in layer.parameters())
    monkeypatch.setattr(cpu, 'KEPT_BIAS_BYTES', 100)
    cpu._kept.clear()
    with torch.no_grad():
        layer(x, (5, 4))
    assert layer not in cpu._kept
    assert file.tell() < weights + 30_000
