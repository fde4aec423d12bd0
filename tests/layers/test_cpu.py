"""The CPU's fast paths give what the modules give, and are taken only by modules that nobody has changed."""
import functools
from unittest import mock

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ls_vision.layers import cpu


@pytest.fixture
def taken(monkeypatch):
    """How many linear maps took the fast path."""
    calls = mock.Mock(wraps=cpu._onednn)
    monkeypatch.setattr(cpu, '_onednn', calls)
    return calls


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
def test_linear_gives_the_same(dtype, bias, taken):
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype).eval()
    x = torch.randn(3, 5, 48, dtype=dtype)[..., ::2]
    expected = layer(x).detach()
    eps = torch.finfo(dtype).eps
    with torch.inference_mode():
        torch.testing.assert_close(cpu.linear(layer, x), expected, rtol=4 * eps, atol=16 * eps)
        assert taken.call_count == (dtype == torch.float32)
        assert cpu.linear(layer, x[:0]).shape == (0, 5, 40)
    assert torch.equal(cpu.linear(layer, x), expected)  # with gradients, the module itself


def test_linear_under_autocast(taken):
    layer = nn.Linear(24, 40).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert cpu.linear(layer, torch.randn(3, 24)).dtype == torch.bfloat16
    assert taken.call_count == 0


@pytest.mark.parametrize('length', [1, 2, 3, 10, 13])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_mlp_gives_the_same(length, dtype, monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK_ELEMENTS', 5 * 64)  # five tokens
    module = Mlp(16, 64).eval().to(dtype)
    eps = torch.finfo(dtype).eps  # products of other lengths may be rounded otherwise
    close = functools.partial(torch.testing.assert_close, rtol=8 * eps, atol=4 * eps)
    x = torch.randn(3, length, 16, dtype=dtype)
    strided = torch.randn(length, 3, 16, dtype=dtype).transpose(0, 1)
    with torch.no_grad():
        close(cpu.mlp(module, x), module(x))
        close(cpu.mlp(module, strided), module(strided))
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(cpu.mlp(module, x), module(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(cpu.mlp(module, x), module(x), rtol=0, atol=0)  # with gradients


def test_mlp_holds_a_chunk_alone(monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK_ELEMENTS', 5 * 64)
    rows = []
    apply = cpu._apply_mlp
    monkeypatch.setattr(cpu, '_apply_mlp', lambda module, x: rows.append(len(x)) or apply(module, x))
    with torch.no_grad():
        cpu.mlp(Mlp(16, 64).eval(), torch.randn(3, 4, 16))
    assert rows == [4, 4, 4]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def forward_of_its_own(module):
    module.fc1.forward = lambda x: 2 * nn.functional.linear(x, module.fc1.weight, module.fc1.bias)


def replaced_layer(module):
    doubled = Doubled(16, 64)
    doubled.load_state_dict(module.fc1.state_dict())
    module.fc1 = doubled


def replaced_activation(module):
    module.act = nn.SiLU()


def hook_on(name):
    def change(module):
        module.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    return change


def pre_hook(module):
    module.fc2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def parametrized(module):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight
    nn.utils.parametrize.register_parametrization(module.fc1, 'weight', Twice())


def dropout_in_training(module):
    module.drop2.p = 1.
    module.drop2.train()


def compiled(module):
    module.fc1.compile(backend='eager')


@pytest.mark.parametrize('change', [
    forward_of_its_own, replaced_layer, replaced_activation, pre_hook, parametrized, dropout_in_training, compiled,
    *(hook_on(name) for name in ('fc1', 'act', 'drop1', 'norm', 'fc2', 'drop2'))])
def test_changed_modules_are_called(change, taken):
    module = Mlp(16, 64).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        before = cpu.mlp(module, x)
        assert taken.call_count == 2
        change(module)
        assert torch.equal(cpu.mlp(module, x), module(x))
        assert taken.call_count == 2
        if change is not compiled:
            assert not torch.allclose(module(x), before)


class Seen(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions = [*getattr(self, 'functions', []), func]
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators = [*getattr(self, 'operators', []), str(func)]
        return func(*args, **(kwargs or {}))


def test_modes_see_the_modules_own_functions(taken):
    layer, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    with torch.no_grad():
        with Seen() as mode:
            cpu.linear(layer, x)
        assert nn.functional.linear in mode.functions
        with Dispatched() as mode:
            cpu.linear(layer, x)
        assert 'aten.addmm.default' in mode.operators
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
        try:
            assert torch.equal(cpu.linear(layer, x), layer(x))
        finally:
            handle.remove()
        with mock.patch.object(nn.functional, 'linear', wraps=nn.functional.linear) as profiler:
            cpu.linear(layer, x)
        assert profiler.call_count == 1
        assert taken.call_count == 0
        cpu.linear(layer.train(), x)
        assert taken.call_count == 0
