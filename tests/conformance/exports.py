"""What the tests of exporters share: programs, the operators in them, and files run in a process of their own."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from families import PEER, small
from torch import nn
from torch.export import Dim

ALONE = Path(__file__).with_name('alone.py')
OPEN_BATCH = ({0: Dim.DYNAMIC},)
OPEN_SIZE = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
ANY_SIZE = ((2, 3, 96, 128), (1, 3, 64, 64), (3, 3, 80, 112))


def draw(*shapes):
    """Random images of several shapes, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flexible(name: str) -> nn.Module:
    """A model that takes images of all sizes, as ours do by themselves."""
    return small(name, **(dict(strict_img_size=False) if name == PEER else {}))


def operators(program):
    """Names of the operators in a graph and in what it calls, and those of them that are not core ATen's.

    `torch.Tag.core` marks what the page 'Core ATen IR' of PyTorch's documentation lists. Python's arithmetic on sizes
    and the indexing of results are no operators.
    """
    names, others = set(), set()
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, 'graph', None), 'nodes', ()):
            if node.op == 'call_function' and isinstance(node.target, torch._ops.OpOverload):
                names.add(str(node.target))
                if torch.Tag.core not in node.target.tags:
                    others.add(str(node.target))
    return sorted(names), sorted(others)


def run_alone(kind, file, images):
    """What a file makes of images in a process that has neither ls_vision nor timm."""
    data = Path(file).with_suffix('.data.npz')
    np.savez(data, **{f'x{i}': x.numpy() for i, x in enumerate(images)})
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-P', str(ALONE), kind, str(file), str(data)], env=env, cwd=data.parent,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    out = np.load(str(data).replace('.npz', '_out.npz'))
    return [torch.from_numpy(out[f'y{i}']) for i in range(len(images))]


def check_alone(kind, file, model, images, atol=1e-4):
    """Equal to the model, which is called after export: that must not have changed it."""
    for x, out in zip(images, run_alone(kind, file, images)):
        with torch.no_grad():
            assert (out - model(x)).abs().max() <= atol, tuple(x.shape)
