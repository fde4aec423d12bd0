"""Linear maps are PyTorch's, whichever library computes them."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ls_vision.layers.linear import Linear
from ls_vision.ops.linear import linear


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('gelu', [True, False])
def test_same_results(dtype, bias, gelu):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 48, dtype=dtype)[..., ::2]
    expected = layer(x)
    if gelu:
        expected = F.gelu(expected)
    tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias, gelu), expected.detach(), **tolerance)
    assert torch.equal(linear(x, layer.weight, layer.bias, gelu), expected)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        half = linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float(), gelu)
    assert half.dtype == torch.bfloat16


def test_follows_its_weights():
    layer = Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.zero_()
        torch.testing.assert_close(layer(x), x @ layer.weight.t())
        assert not torch.allclose(layer(x), before)
        assert layer(x[:0]).shape == (0, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_flops_are_counted():
    layer = Linear(8, 16)
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 10 * 8 * 16
