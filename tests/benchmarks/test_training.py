"""The benchmark of training steps compares what it says, and refuses cases that do not exist."""
import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / 'benchmarks' / 'training.py'
# by path: tests/training has the same name
spec = importlib.util.spec_from_file_location('benchmark_of_training', PATH)
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)


def arguments(monkeypatch, *options):
    monkeypatch.setattr(sys, 'argv', ['training.py', *options])
    return training.parse_args()


def test_compare(monkeypatch):
    args = arguments(monkeypatch, '--cases', 'vil_ls_tiny_linear,64,1,step,vil_ls_tiny', '--seconds', '0.01')
    row = training.compare(args.cases[0], args)
    assert set(row['seconds']) == {'vil_ls_tiny_linear', 'vil_ls_tiny', 'linear', 'free'}
    assert row['linear']['median'] < 1.5  # a part of a model against a whole one
    for shares in row['shares'].values():
        assert sum(shares.values()) == pytest.approx(100)
        assert shares['linear maps'] > 5
    assert 'vil_ls_tiny_linear | 64 | 1 |' in training.markdown([row])


def test_models_of_a_fixed_size_are_built_for_the_size_of_the_case(monkeypatch):
    case = training.Case('vil_ls_tiny', 64, 1, 'inference', ('vit_tiny_patch16_224',))
    training.Contender('vit_tiny_patch16_224', case, arguments(monkeypatch))()


def test_a_step_trains_and_inference_does_not(monkeypatch):
    args = arguments(monkeypatch)
    for mode in training.MODES:
        contender = training.Contender('vil_ls_tiny', training.Case('vil_ls_tiny', 64, 1, mode, ()), args)
        contender()
        grads = [p.grad for p in contender.model.parameters()]
        assert all((grad is not None) == (mode == 'step') for grad in grads)


def test_free_attention_gives_every_linear_map_gradients_and_ends(monkeypatch):
    for name in ('vil_ls_tiny', 'vil_ls_tiny_linear'):
        contender = training.Contender(name, training.Case(name, 64, 1, 'step', ()), arguments(monkeypatch))
        contender.model.eval()
        before = contender.model(contender.images)
        contender.without_attention()
        assert all(m.weight.grad is not None for m in contender.model.modules() if isinstance(m, torch.nn.Linear))
        with training.free_attention():
            assert not torch.allclose(contender.model(contender.images), before)
        assert torch.equal(contender.model(contender.images), before)


def test_linear_maps_of_a_step_have_gradients(monkeypatch):
    contender = training.Contender(
        'vil_ls_tiny', training.Case('vil_ls_tiny', 64, 1, 'step', ()), arguments(monkeypatch))
    contender.linear_maps()()
    for module in contender.model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.grad is not None


@pytest.mark.parametrize('text', [
    'vil_ls_tiny', 'vil_ls_tiny,224,8,step', 'vil_ls_tiny,224,8,train,vil_ls_small', 'no_such,224,8,step,vil_ls_tiny',
    'vil_ls_tiny,big,8,step,vil_ls_small', 'vil_ls_tiny,224,8,step,no_such', 'vil_ls_tiny,0,8,step,vil_ls_small',
    'vil_ls_tiny,224,0,step,vil_ls_small', 'vil_ls_tiny,224,8,step,vil_ls_tiny'])
def test_wrong_cases(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        training.parse_case(text)
