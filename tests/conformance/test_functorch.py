"""Transforms of torch.func: per-sample gradients, ensembles, forward mode, products with Jacobian and Hessian.

Each is compared with the plain computation it stands for: a loop over samples or models, or finite differences in
float64.
"""
import pytest
import torch
import torch.nn.functional as F
from families import each_model, images, small, tiny
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

TARGETS = torch.tensor([0, 2, 1])


def split(model, frozen=()):
    """Parameters to differentiate by, and everything else."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    trained = {n: p for n, p in parameters.items() if not any(f in n for f in frozen)}
    rest = {n: p for n, p in parameters.items() if n not in trained}
    return trained, {**rest, **{n: b.detach() for n, b in model.named_buffers()}}


def sample_loss(model, rest):
    def loss(parameters, image, target):
        logits = functional_call(model, ({**parameters, **rest},), (image.unsqueeze(0),))
        return F.cross_entropy(logits, target.unsqueeze(0))
    return loss


def loop_of_grads(model, x, targets, names):
    """Gradients of one sample at a time by plain backward."""
    out = {n: [] for n in names}
    for image, target in zip(x, targets):
        model.zero_grad()
        F.cross_entropy(model(image.unsqueeze(0)), target.unsqueeze(0)).backward()
        for n in names:
            out[n].append(model.get_parameter(n).grad.clone())
    return {n: torch.stack(grads) for n, grads in out.items()}


@pytest.mark.item('per-sample gradients, `vmap(grad(functional_call))`: those of a loop')
@pytest.mark.parametrize('frozen', [(), ('bias_table', 'relative_position_bias', 'norm')], ids=['all', 'some frozen'])
@each_model()
def test_per_sample_gradients(name, frozen):
    model, x = small(name), images(3)
    trained, rest = split(model, frozen)
    grads = vmap(grad(sample_loss(model, rest)), in_dims=(None, 0, 0))(trained, x, TARGETS)
    expected = loop_of_grads(model, x, TARGETS, trained)
    for n in trained:
        torch.testing.assert_close(grads[n], expected[n], rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f'{n}: {m}')


@pytest.mark.item('per-sample gradients in chunks, with dropout in training (`randomness="different"`)')
@each_model()
def test_per_sample_gradients_in_training(name):
    model, x = small(name, attn_drop_rate=.1, proj_drop_rate=.1).train(), images(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    trained, rest = split(model)
    per_sample = vmap(
        grad_and_value(sample_loss(model, rest)), in_dims=(None, 0, 0), randomness='different', chunk_size=2)
    grads, losses = per_sample(trained, x[:1].expand(3, -1, -1, -1), TARGETS[:1].expand(3))
    assert losses.std() > 0 and all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.item('`torch.func.grad` under autocast to bfloat16: as backward under autocast')
@each_model()
def test_grad_under_autocast(name):
    """Of one sample: PyTorch's vmap and autocast together fail in the backward pass of norms, Swin's among them."""
    model, x = small(name), images(1)
    trained, rest = split(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        grads = grad(sample_loss(model, rest))(trained, x[0], TARGETS[0])
        F.cross_entropy(model(x), TARGETS[:1]).backward()
    ours = torch.cat([g.float().flatten() for g in grads.values()])
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert F.cosine_similarity(ours, theirs, dim=0) > .995


@pytest.mark.item('ensembles, `vmap` over `stack_module_state`: one model after the other')
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@each_model()
def test_ensemble(name, mode):
    models, x = [small(name) for _ in range(3)], images(2)
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + .1 * i)
    with mode():
        parameters, buffers = stack_module_state(models)
        out = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), in_dims=(0, 0, None))(
            parameters, buffers, x)
        expected = torch.stack([model(x) for model in models])
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.item('`vmap` over images: the batch at once')
@each_model()
def test_vmap_over_images(name):
    model, x = small(name), images(3)
    with torch.no_grad():
        out = vmap(lambda image: model(image.unsqueeze(0)).squeeze(0))(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def difference(f, x, v, step=1e-5):
    """Derivative of `f` along `v` by central differences."""
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


@pytest.mark.item('forward mode, `torch.func.jvp` by the image: finite differences in float64')
@each_model()
def test_jvp_by_image(name):
    model = tiny(name)
    x, v = images(1, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    out, tangent = jvp(model, (x,), (v,))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x))
        torch.testing.assert_close(tangent.detach(), difference(model, x, v), rtol=1e-5, atol=1e-7)


@pytest.mark.item('forward mode by the parameters: finite differences in float64')
@each_model()
def test_jvp_by_parameters(name):
    model = tiny(name)
    x = images(1, 32, dtype=torch.float64)
    trained, rest = split(model)
    vs = {n: torch.randn_like(p) for n, p in trained.items()}

    def f(parameters):
        return functional_call(model, ({**parameters, **rest},), (x,))

    _, tangent = jvp(f, (trained,), (vs,))
    step = 1e-5
    with torch.no_grad():
        ahead, behind = ({n: p + s * vs[n] for n, p in trained.items()} for s in (step, -step))
        expected = (f(ahead) - f(behind)) / (2 * step)
    torch.testing.assert_close(tangent.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.item('forward mode by `torch.autograd.forward_ad` dual tensors, and `linearize`')
@each_model()
def test_forward_ad_and_linearize(name):
    model = tiny(name).requires_grad_(False)
    x, v = images(1, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = difference(model, x, v)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, v))).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-7)
    out, apply = linearize(model, x)
    torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(apply(v), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.item('`vjp`, `jacrev` and `jacfwd` agree with each other and with plain backward')
@each_model()
def test_jacobians(name):
    model = tiny(name).requires_grad_(False)
    x = images(1, 32, dtype=torch.float64)
    backward = jacrev(model)(x)

    def of_corner(corner):
        return model(x + F.pad(corner, (0, 28, 0, 28)))

    corner = jacfwd(of_corner)(torch.zeros(1, 3, 4, 4, dtype=x.dtype))
    torch.testing.assert_close(corner, backward[..., :4, :4])
    leaf = x.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(model(leaf)[0, i], leaf)[0] for i in range(3)])
    torch.testing.assert_close(backward[0], expected)
    out, pull = vjp(model, x)
    torch.testing.assert_close(pull(torch.ones_like(out))[0], expected.sum(dim=0))


@pytest.mark.item('Hessian-vector products, forward over reverse and reverse over reverse: finite differences in float64')
@each_model()
def test_hessian_vector_product(name):
    model = tiny(name).requires_grad_(False)
    x, v = images(1, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def f(x):
        return model(x).square().sum()

    expected = difference(grad(f), x, v)
    torch.testing.assert_close(jvp(grad(f), (x,), (v,))[1], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(vjp(grad(f), x)[1](v)[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.item('the whole `torch.func.hessian` by the classifier and a norm: symmetric, finite differences')
@each_model()
def test_hessian(name):
    model = tiny(name)
    x = images(1, 32, dtype=torch.float64)
    chosen = next(n for n in dict(model.named_parameters()) if n.endswith('norm1.weight'))
    trained, rest = split(model)
    weight = trained.pop(chosen)

    def f(weight):
        return functional_call(model, ({**trained, **rest, chosen: weight},), (x,)).square().sum()

    matrix = hessian(f)(weight)
    torch.testing.assert_close(matrix, matrix.T)
    v = torch.randn_like(weight)
    torch.testing.assert_close(matrix @ v, difference(grad(f), weight, v), rtol=1e-4, atol=1e-6)
