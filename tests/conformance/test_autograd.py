"""Derivatives of derivatives by plain autograd, gradient checks, checkpointing, anomaly mode.

Everything is compared in float64 with finite differences or with the same computation done another way.
"""
import pytest
import torch
from families import each_model, images, small, tiny
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, hvp, jacobian
from torch.autograd.functional import jvp as double_backward_jvp
from torch.utils.checkpoint import checkpoint


def attentions(model):
    """The first attention layer of each class, and one set of inputs to it."""
    kept = {}

    def keep(module, args):
        kept.setdefault(type(module).__name__, (module, args))

    handles = [m.register_forward_pre_hook(keep) for n, m in model.named_modules() if n.endswith('.attn')]
    model(images(1, 32, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    assert kept
    return list(kept.values())


@pytest.mark.slow
@pytest.mark.item('`gradcheck` and `gradgradcheck` of the attention layers, by input and parameters')
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@each_model()
def test_gradchecks_of_layers(name, training):
    for layer, (x, *rest) in attentions(tiny(name)):
        layer.train(training)
        names, parameters = zip(*layer.named_parameters())
        x = x.detach().clone().requires_grad_()

        def f(x, *values, layer=layer, names=names, rest=rest):
            return torch.func.functional_call(layer, dict(zip(names, values)), (x, *rest))

        assert gradcheck(f, (x, *parameters), fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, (x, *parameters), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.slow
@pytest.mark.item('`gradcheck` and `gradgradcheck` of whole models by the image')
@each_model()
def test_gradchecks_of_models(name):
    model = tiny(name)
    x = images(1, 32, dtype=torch.float64).requires_grad_()
    assert gradcheck(model, (x,), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(model, (x,), fast_mode=True)


@pytest.mark.slow
@pytest.mark.item('gradient penalty (`create_graph=True`): its gradients are finite differences, and it trains')
@pytest.mark.parametrize('frozen', [False, True], ids=['all', 'tables and norms frozen'])
@each_model()
def test_gradient_penalty(name, frozen):
    model = tiny(name)
    x = images(2, 32, dtype=torch.float64)
    if frozen:
        for n, parameter in model.named_parameters():
            parameter.requires_grad_('relative_position_bias' not in n and 'norm' not in n)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def penalty():
        leaf = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return gradient.square().sum()

    grads = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    vs = [torch.randn_like(p) for p in parameters]
    along = sum((g * v).sum() for g, v in zip(grads, vs) if g is not None)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, v in zip(parameters, vs):
                p.add_(v, alpha=step)
        values.append(float(penalty()))
    assert float(along) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)

    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(5):
        loss = penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.item('gradient penalty under autocast to bfloat16: near that of float32')
@each_model()
def test_gradient_penalty_under_autocast(name):
    model, directions = small(name), []
    for enabled in (False, True):
        model.zero_grad()
        x = images(2).requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            gradient, = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        directions.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*directions, dim=0) > .98


@pytest.mark.slow
@pytest.mark.item('`torch.autograd.functional`: jacobian (vectorised, both modes), jvp, hvp; finite differences')
@each_model()
def test_autograd_functional(name):
    model = tiny(name).requires_grad_(False)
    x, v = images(1, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain = jacobian(model, x)
    torch.testing.assert_close(jacobian(model, x, vectorize=True), plain)
    step = 1e-5
    forward = (model(x + step * v) - model(x - step * v)) / (2 * step)
    torch.testing.assert_close(double_backward_jvp(model, x, v)[1], forward, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((plain * v).sum(dim=(2, 3, 4, 5)), forward, rtol=1e-5, atol=1e-7)

    def loss(x):
        return model(x).square().sum()

    grads = [torch.autograd.functional.vjp(loss, x + s * v)[1] for s in (step, -step)]
    torch.testing.assert_close(hvp(loss, x, v)[1], (grads[0] - grads[1]) / (2 * step), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.item('`torch.autograd.functional.hessian` of an attention layer: symmetric, plain and vectorised')
@each_model()
def test_hessian_of_a_layer(name):
    for layer, (x, *rest) in attentions(tiny(name)):
        chosen = layer.proj.bias if isinstance(layer.proj, torch.nn.Linear) else next(layer.parameters())
        chosen_name = next(n for n, p in layer.named_parameters() if p is chosen)

        fixed = x.detach()

        def f(value, layer=layer, chosen_name=chosen_name, x=fixed, rest=rest):
            return torch.func.functional_call(layer, {chosen_name: value}, (x, *rest)).pow(3).sum()

        matrix = hessian(f, chosen.detach())
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(hessian(f, chosen.detach(), vectorize=True), matrix)
        assert matrix.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.item('checkpointing: `set_grad_checkpointing`, re-entrant or not, gives equal gradients')
@pytest.mark.parametrize('use_reentrant', [False, True])
@each_model()
def test_checkpointing(name, use_reentrant):
    grads = []
    for how in ('plain', 'own', 'outer'):
        model, x = small(name), images(2).requires_grad_()
        if how == 'own':
            model.set_grad_checkpointing()
        model.train()
        out = checkpoint(model, x, use_reentrant=use_reentrant) if how == 'outer' else model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, *others in zip(*grads):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.item('anomaly mode, saved-tensor hooks and retained graphs')
@each_model()
def test_graph_tools(name):
    model, sizes = small(name), []
    plain = torch.autograd.grad(model(images(2)).square().sum(), list(model.parameters()))
    with torch.autograd.detect_anomaly(check_nan=True), torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t.clone(), lambda t: t):
        loss = model(images(2)).square().sum()
    with torch.autograd.detect_anomaly(check_nan=True):
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(model.parameters()))
    assert sizes
    for a, b, c in zip(plain, first, second):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, c)


@pytest.mark.slow
@pytest.mark.item('batched vector-Jacobian products, `torch.autograd.grad(..., is_grads_batched=True)`')
@each_model()
def test_batched_grads(name):
    model, x = small(name), images(2).requires_grad_()
    out = model(x)
    vs = torch.randn(3, *out.shape)
    batched, = torch.autograd.grad(out, x, vs, is_grads_batched=True, retain_graph=True)
    for v, gradient in zip(vs, batched):
        torch.testing.assert_close(gradient, torch.autograd.grad(out, x, v, retain_graph=True)[0], rtol=1e-4, atol=1e-5)
