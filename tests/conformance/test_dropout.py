"""Dropout means what its modules say: Monte Carlo dropout, rates, and what is dropped where.

Monte Carlo dropout switches the dropout modules alone to training, in a model that is otherwise in evaluation, and
averages many outputs without gradients.
"""
import pytest
import torch
from families import each_model, images, small
from torch import nn

RATES = dict(attn_drop_rate=.2, proj_drop_rate=.3, drop_rate=.4)
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
each_mode = pytest.mark.parametrize('mode', MODES, ids=lambda m: m.__name__)


def dropouts(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}


def outputs(model, x, times=3):
    return torch.stack([model(x).detach().clone() for _ in range(times)])


@pytest.mark.item('Monte Carlo dropout: every dropout module alone makes the output vary')
@each_mode
@each_model()
def test_each_dropout_alone(name, mode):
    model, x = small(name, **RATES), images(1)
    modules, without_effect = dropouts(model), []
    assert len(modules) > 8
    with mode():
        assert (outputs(model, x) == outputs(model, x, 1)).all()
        for n, module in modules.items():
            module.train()
            if outputs(model, x).std(dim=0).max() == 0:
                without_effect.append(n)
            module.eval()
        assert (outputs(model, x) == outputs(model, x, 1)).all()
    assert without_effect == []


@pytest.mark.item('Monte Carlo dropout: each module drops the share that it says and scales the rest')
@each_mode
@each_model()
def test_share_that_is_dropped(name, mode):
    model, x, seen = small(name, **RATES), images(2), {}

    def keep(module, args, out):
        seen[names[module]] = args[0].detach().clone(), out.detach().clone()

    names = {m: n for n, m in dropouts(model).items()}
    for module in names:
        module.train()
        module.register_forward_hook(keep)
    with mode():
        model(x)
    assert set(seen) == set(dropouts(model))
    for n, (before, after) in seen.items():
        p = model.get_submodule(n).p
        kept = after != 0
        allowed = 5 * (p * (1 - p) / before.numel()) ** .5 + float((before == 0).float().mean())
        assert abs(1 - float(kept.float().mean()) - p) <= allowed, n
        torch.testing.assert_close(after[kept], before[kept] / (1 - p))


@pytest.mark.item('Monte Carlo dropout: the mean of many outputs has the spread of training mode')
@each_model()
def test_same_distribution_as_training(name):
    model, x = small(name, **RATES), images(1)
    for module in dropouts(model).values():
        module.train()
    with torch.no_grad():
        alone = outputs(model, x, 80)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        training = outputs(model, x, 80)
    error = (alone.var(dim=0) + training.var(dim=0)).div(80).sqrt()
    assert ((alone.mean(dim=0) - training.mean(dim=0)).abs() <= 5 * error).all()
    ratio = alone.std(dim=0) / training.std(dim=0)
    assert (ratio > .5).all() and (ratio < 2.).all()


@pytest.mark.item('a rate that is changed on the module (`module.p = 0.9`) counts from then on')
@each_mode
@each_model()
def test_rate_changed_on_the_module(name, mode):
    model, x = small(name), images(1)
    ignored = []
    with mode():
        before = model(x)
        for n, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                module.train()
                module.p = .9
                if (model(x) - before).abs().max() == 0:
                    ignored.append(n)
                module.eval()
    assert ignored == []
