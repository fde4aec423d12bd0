"""Cases that every rank of a test runs: the split model beside the unsplit one on the same images."""
from typing import NamedTuple, Optional

import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import ls_vision  # noqa: F401  registers the models
from ls_vision.parallel import gather_maps, parallelize, row_multiple, split_image

CVT = dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), rank=3, window_size=(8, 4))
VIL = dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), rank=3, window_size=2, num_global_tokens=1)


class Case(NamedTuple):
    """A model, an image and a number of ranks."""
    ranks: int
    height: int
    model: str = 'vil_ls_tiny_linear'
    args: dict = VIL
    width: int = 40
    strips: Optional[tuple] = None
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    steps: int = 1
    features_only: bool = False


def run(cases):
    """{name: errors} of the cases, of those in which this rank takes part."""
    out = {}
    for name, case in cases.items():
        mesh = DeviceMesh('cpu', list(range(case.ranks)), mesh_dim_names=('space',))
        if dist.get_rank() < case.ranks:
            out[name] = compare(case, mesh)
    return out


def build(case, seed=0):
    torch.manual_seed(seed)
    args = dict(case.args, features_only=True) if case.features_only else dict(case.args, num_classes=5)
    model = timm.create_model(case.model, **args).to(case.dtype)
    for parameter in model.parameters():  # zeros and ones would hide errors
        parameter.data += .1 * torch.randn_like(parameter)
    if case.checkpointing:
        model.set_grad_checkpointing()
    return model


def images(case):
    return torch.randn(2, 3, case.height, case.width, generator=torch.Generator().manual_seed(7)).to(case.dtype)


def compare(case, mesh):
    """For outputs, gradients, parameters and buffers: (error, tolerance), relative to the largest value.

    The tolerance is 1e-5, or 1e-11 for doubles; more where rounding alone takes the unsplit model in float32 further
    away from the one in float64: gradients that cancel, as in front of a batch norm. There the split model is no
    further from float64 than the unsplit one, and sums over ranks, batch norms or merges in float64 bring the two no
    nearer to each other. All gradients together, as one vector, have the tolerance 2e-6.
    """
    split = parallelize(build(case, seed=dist.get_rank()), mesh)
    x = images(case)
    strip = split_image(x, mesh, row_multiple(split)) if case.strips is None else cut(x, case.strips, mesh)
    expected, found = train(build(case), x, case, None), train(split, strip, case, mesh)
    assert expected.keys() == found.keys()
    for out in (expected, found):
        out['all gradients'] = torch.cat([t.flatten() for key, t in out.items() if key.startswith('gradient')])
    if case.dtype == torch.float64:
        return {key: (error(found[key], expected[key]), 1e-11) for key in found}
    exact = train(build(case).double(), x.double(), case, None)
    together = {'all gradients': (difference(found.pop('all gradients'), expected.pop('all gradients')), 2e-6)}
    return together | {
        key: (error(found[key], expected[key]), max(1e-5, 4 * error(expected[key], exact[key]))) for key in found}


def cut(x, strips, mesh):
    return x.split(list(strips), dim=2)[mesh.get_local_rank()]


def train(model, x, case, mesh):
    """Outputs and gradients of the first step, and what the last leaves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    out = {}
    for step in range(case.steps):
        optimizer.zero_grad()
        y = model(x)
        if case.features_only:
            y = y if mesh is None else gather_maps(y, mesh)
            loss = sum((m * torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view(m.shape)).sum() for m in y)
        else:
            loss = torch.nn.functional.cross_entropy(y, torch.tensor([1, 3]))
            y = [y]
        loss.backward()
        if step == 0:
            out.update({f'output {i}': m.detach() for i, m in enumerate(y)})
            out.update({f'gradient {key}': p.grad.clone() for key, p in model.named_parameters()})
        optimizer.step()
    out.update({f'state {key}': t.clone() for key, t in model.state_dict().items()})
    # a constant added to the scores leaves their softmax as it is: the gradient is rounding, which AdamW enlarges
    return {key: t for key, t in out.items() if not key.endswith('to_dynamic_projection.bias')}


def difference(a, b):
    """Norm of the difference over the norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def error(a, b):
    """Largest difference over the largest value."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
