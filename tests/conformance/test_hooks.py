"""Hooks, replaced modules and recorders see the computation that the model does, in training and in evaluation.

A fast path that leaves out a module's own call makes its hooks silent and what they change lost. Each check here looks
at a module from outside: is its hook run, and does a change of its output change the model's output by as much in all
modes of gradients?
"""
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families import called_modules, each_model, full, images, linears, small
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MODES = {
    'train': (True, nullcontext),
    'eval with gradients': (False, torch.enable_grad),
    'eval with no_grad': (False, torch.no_grad),
    'eval with inference_mode': (False, torch.inference_mode),
}


def run(model, x, mode='eval with gradients'):
    """Output in one of the four modes; batch norm stays in evaluation, so that all four give the same."""
    training, context = MODES[mode]
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with context():
        return model(x).detach().clone()


def change(output):
    """A change that no norm takes back: a factor of its own for every element."""
    def scale(x):
        return x * (1 + torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype))
    return tree_map_only(torch.Tensor, scale, output)


def effects(model, x, install):
    """Modules that `install` changes to no effect, and those where the effect depends on the mode.

    `install(name, module)` returns a function that takes the change back.
    """
    before = run(model, x)
    ignored, different = [], []
    for name, module in called_modules(model):
        remove = install(name, module)
        outputs = [run(model, x, mode) for mode in MODES]
        remove()
        if any((out - before).abs().max() < 1e-4 for out in outputs):
            ignored.append(name)
        if any((out - outputs[0]).abs().max() > 1e-4 * outputs[0].abs().max() for out in outputs):
            different.append(name)
    torch.testing.assert_close(run(model, x), before, rtol=0., atol=0.)
    return dict(ignored=ignored, different=different)


NO_EFFECTS_LOST = dict(ignored=[], different=[])


@pytest.mark.item('forward hooks run on every module of the full model, all hooked at once')
@each_model()
def test_every_hook_runs(name):
    model, silent = full(name), {}
    modules, seen = called_modules(model), set()
    for n, module in modules:
        module.register_forward_hook(lambda *_, n=n: seen.add(n))
    for mode in MODES:
        seen.clear()
        run(model, images(1, 224), mode)
        silent[mode] = sorted({n for n, _ in modules} - seen)
    assert silent == {mode: [] for mode in MODES}


@pytest.mark.slow
@pytest.mark.item('a hook that changes an output changes the result, alike in all modes')
@each_model()
def test_changed_outputs_count(name):
    def install(_, module):
        return module.register_forward_hook(lambda m, args, output: change(output)).remove
    assert effects(small(name), images(1), install) == NO_EFFECTS_LOST


@pytest.mark.slow
@pytest.mark.item('a pre-hook that changes an input changes the result, alike in all modes')
@each_model()
def test_changed_inputs_count(name):
    def install(_, module):
        return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:])).remove
    assert effects(small(name), images(1), install) == NO_EFFECTS_LOST


class Changed(nn.Module):
    """Stands in for a module and changes what it returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return change(self.inner(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.item('a submodule that is replaced (activation, attn_drop, norm, linear layer) takes effect, alike in all '
                  'modes')
@each_model()
def test_replaced_submodules_take_effect(name):
    model = small(name)

    def install(n, module):
        if not n or next(module.children(), None) is not None:  # what the model reads attributes of
            return module.register_forward_hook(lambda m, args, output: change(output)).remove
        model.set_submodule(n, Changed(module))
        return lambda: model.set_submodule(n, module)

    assert effects(model, images(1), install) == NO_EFFECTS_LOST


@pytest.mark.slow
@pytest.mark.item("a module's `forward` that is replaced on the instance takes effect, alike in all modes")
@each_model()
def test_patched_forward_takes_effect(name):
    def install(_, module):
        forward = module.forward
        module.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
        return lambda: delattr(module, 'forward')

    assert effects(small(name), images(1), install) == NO_EFFECTS_LOST


@pytest.mark.slow
@pytest.mark.item('full backward hooks and pre-hooks see the gradient of every module')
@each_model()
def test_every_backward_hook_runs(name):
    model, silent = small(name), []
    for n, module in called_modules(model):
        grads = []
        handles = [
            module.register_full_backward_hook(lambda m, i, o: grads.extend(o)),  # noqa: B023
            module.register_full_backward_pre_hook(lambda m, o: grads.extend(o)),  # noqa: B023
        ]
        model(images(1).requires_grad_()).square().sum().backward()
        for handle in handles:
            handle.remove()
        if len(grads) < 2 or any(g is None or not g.abs().sum() > 0 for g in grads):
            silent.append(n)
    assert silent == []


@pytest.mark.slow
@pytest.mark.item('global forward hooks see every module')
@each_model()
def test_global_hooks_see_every_module(name):
    model, calls = small(name), Counter()
    handles = [
        nn_module.register_module_forward_hook(lambda m, *_: calls.update([m])),
        nn_module.register_module_forward_pre_hook(lambda m, *_: calls.update([m])),
    ]
    silent = {}
    try:
        for mode in MODES:
            calls.clear()
            run(model, images(1), mode)
            silent[mode] = [n for n, m in called_modules(model) if calls[m] < 2 or calls[m] % 2]
    finally:
        for handle in handles:
            handle.remove()
    assert silent == {mode: [] for mode in MODES}


@pytest.mark.slow
@pytest.mark.item('MLPs with another activation put in: fc2(act(fc1(x))) of it')
@pytest.mark.parametrize('act', [nn.SiLU, nn.ReLU, nn.Identity])
@each_model()
def test_replaced_activation(name, act):
    model, calls = small(name), []
    mlps = [m for n, m in model.named_modules() if n.endswith('.mlp')]
    for mlp in mlps:
        mlp.act = act()
        mlp.register_forward_hook(lambda m, args, out: calls.append((m, args[0].detach(), out.detach())))
    for mode in MODES:
        calls.clear()
        run(model, images(1), mode)
        assert len(calls) == len(mlps) > 0
        for mlp, x, out in calls:
            with torch.no_grad():
                hidden = act()(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
                expected = F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.slow
@pytest.mark.item('`parametrize` on every linear layer: the model with these weights')
@each_model()
def test_parametrized_weights(name):
    model, plain, x = small(name), small(name), images(1)
    with torch.no_grad():
        for n, module in linears(model).items():
            parametrize.register_parametrization(module, 'weight', Doubled())
            plain.get_submodule(n).weight.mul_(2.)
    for mode in MODES:
        torch.testing.assert_close(run(model, x, mode), run(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.item('spectral norm by parametrisation on every linear layer: trains, largest singular value 1')
@each_model()
def test_spectral_norm(name):
    model = small(name)
    layers = list(linears(model).values())
    for module in layers:
        parametrizations.spectral_norm(module)
    model.train()
    for _ in range(10):  # a step of the power iteration each
        loss = model(images(1)).square().sum()
    loss.backward()
    for module in layers:
        assert float(torch.linalg.matrix_norm(module.weight.detach(), 2)) == pytest.approx(1., abs=.1)
        assert module.parametrizations.weight.original.grad.abs().sum() > 0


class FunctionRecorder(TorchFunctionMode):
    """Counts calls of torch's functions by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls[resolve_name(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.item('a TorchFunctionMode sees a linear map for each linear layer, and the result is the same')
@each_model()
def test_torch_function_mode(name):
    model, x, counts = small(name), images(1), {}
    for mode in MODES:
        with FunctionRecorder() as recorder:
            out = run(model, x, mode)
        torch.testing.assert_close(out, run(model, x, mode), rtol=1e-4, atol=1e-5)
        counts[mode] = recorder.calls['torch.nn.functional.linear']
    assert min(counts.values()) >= len(linears(model)), counts


class DispatchRecorder(TorchDispatchMode):
    """Keeps the namespaces of the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.item('a TorchDispatchMode sees operators of ATen alone, and the result is the same')
@each_model()
def test_torch_dispatch_mode(name):
    model, x, namespaces = small(name), images(1), {}
    for mode in MODES:
        with DispatchRecorder() as recorder:
            out = run(model, x, mode)
        torch.testing.assert_close(out, run(model, x, mode), rtol=1e-4, atol=1e-5)
        namespaces[mode] = recorder.namespaces
    assert namespaces == {mode: {'aten'} for mode in MODES}


class Tagged(torch.Tensor):
    """A subclass whose operations all pass through `__torch_function__`."""


@pytest.mark.slow
@pytest.mark.item('a subclass of Tensor as the input comes out as that subclass, with the same values')
@each_model()
def test_tensor_subclass_input(name):
    model, x = small(name), images(1)
    for mode in MODES:
        out = run(model, x.as_subclass(Tagged), mode)
        assert type(out) is Tagged, mode
        torch.testing.assert_close(out.as_subclass(torch.Tensor), run(model, x, mode), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.item('ATen operators alone and equal results with a subclass of Tensor as the weights')
@each_model()
def test_tensor_subclass_weights(name):
    model, plain, x = small(name), small(name), images(1)
    for module in linears(model).values():
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Tagged))
    for mode in MODES:
        out = run(model, x, mode)
        torch.testing.assert_close(out.as_subclass(torch.Tensor), run(plain, x, mode), rtol=1e-4, atol=1e-5)
