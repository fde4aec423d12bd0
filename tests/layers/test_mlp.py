"""The MLP in chunks is timm's, whatever the length, and whoever looks at its parts sees them whole."""
import functools

import pytest
import torch
from timm.layers import Mlp

from ls_vision.layers import mlp as module
from ls_vision.layers.mlp import ChunkedMlp


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(module, 'CHUNK_ELEMENTS', 5 * 64)  # five tokens
    torch.manual_seed(0)
    ours, timms = ChunkedMlp(16, 64).eval(), Mlp(16, 64).eval()
    timms.load_state_dict(ours.state_dict())
    return ours, timms


@pytest.mark.parametrize('length', [1, 2, 3, 10, 13])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_results(pair, length, dtype):
    ours, timms = (m.to(dtype) for m in pair)
    # products of other lengths may be rounded otherwise
    eps = torch.finfo(dtype).eps
    close = functools.partial(torch.testing.assert_close, rtol=8 * eps, atol=4 * eps)
    x = torch.randn(3, length, 16, dtype=dtype)[:, ::1]
    with torch.no_grad():
        close(ours(x), timms(x))
        strided = torch.randn(length, 3, 16, dtype=dtype).transpose(0, 1)
        close(ours(strided), timms(strided))
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(ours(x), timms(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours(x), timms(x), rtol=0, atol=0)  # with gradients


def test_memory_for_a_chunk_alone(pair, monkeypatch):
    ours, _ = pair
    rows = []
    apply = ours._apply_to_chunk
    monkeypatch.setattr(ours, '_apply_to_chunk', lambda x: rows.append(len(x)) or apply(x))
    with torch.no_grad():
        ours(torch.randn(3, 4, 16))
    assert rows == [4, 4, 4]


def test_another_activation(pair):
    ours, timms = pair
    ours.act = timms.act = torch.nn.SiLU()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), timms(x))


def test_layers_that_stand_in(pair):
    ours, _ = pair

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(2, 9, 16)
    before = ours(x)
    doubled = Doubled(64, 16)
    doubled.load_state_dict(ours.fc2.state_dict())
    ours.fc2 = doubled
    with torch.no_grad():
        torch.testing.assert_close(ours(x), 2 * before)


def test_hooks_see_all_tokens(pair):
    ours, _ = pair
    seen = []
    ours.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        ours(torch.randn(2, 9, 16))
    assert seen == [(2, 9, 64)]
