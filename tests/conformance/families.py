"""The models that every item of the suite is run on: ours, and one of timm's beside them as the control.

The control is Swin-T, timm's hierarchical transformer with windows. What it can't do itself is marked where it is used,
with the reason, and the run fails once timm can do it.
"""
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
from torch import nn

import ls_vision  # noqa: F401, registers the models

OURS = ('vil_ls_tiny', 'vil_ls_tiny_linear', 'cvt_ls_13')
PEER = 'swin_tiny_patch4_window7_224'
MODELS = (*OURS, PEER)

SMALL: Dict[str, Dict[str, Any]] = {
    'vil_ls_tiny': dict(embed_dims=(24, 48, 96, 96), depths=(1, 1, 1, 1), num_heads=(1, 3, 3, 6)),
    'vil_ls_tiny_linear': dict(embed_dims=(24, 48, 96, 96), depths=(1, 1, 1, 1), num_heads=(1, 3, 3, 6)),
    'cvt_ls_13': dict(embed_dims=(32, 48, 96), depths=(1, 1, 1), num_heads=(1, 3, 6)),
    PEER: dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 6), drop_path_rate=0.),
}
TINY: Dict[str, Dict[str, Any]] = {
    'vil_ls_tiny': dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=2, rank=2, window_size=2, mlp_ratio=2),
    'vil_ls_tiny_linear': dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=2, rank=2, window_size=2, mlp_ratio=2),
    'cvt_ls_13': dict(embed_dims=(8, 8, 8), depths=(1, 1, 1), num_heads=2, rank=2, window_size=2, mlp_ratio=2),
    PEER: dict(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2, mlp_ratio=2., drop_path_rate=0.),
}


def each_model(peer_cannot: str = '', **ours_cannot: str) -> pytest.MarkDecorator:
    """Runs a test on all models; a model that can't do it, for the reason given, has to go on failing."""
    reasons = {PEER: peer_cannot, **ours_cannot}
    return pytest.mark.parametrize('name', [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reasons[name])) if reasons.get(name) else name
        for name in MODELS])


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model in evaluation mode, the same in every call; biases, tables and norms are not what they start as."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * .05)
    return model


def small(name: str, img_size: int = 64, **kwargs: Any) -> nn.Module:
    """A few thin blocks of a family, all of its kinds of layers among them, with ten classes."""
    return build(name, **{**SMALL[name], 'img_size': img_size, 'num_classes': 10, **kwargs})


def tiny(name: str, img_size: int = 32, **kwargs: Any) -> nn.Module:
    """A few thousand parameters in float64, for what is compared with finite differences."""
    return build(name, **{**TINY[name], 'img_size': img_size, 'num_classes': 3, **kwargs}).double()


def full(name: str, **kwargs: Any) -> nn.Module:
    """The model as it is registered, with random weights."""
    return timm.create_model(name, **kwargs).eval()


def images(batch: int = 2, img_size: int = 64, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same random images in every process."""
    return torch.randn(batch, channels, img_size, img_size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def linears(model: nn.Module) -> Dict[str, nn.Linear]:
    """Every linear layer of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def called_modules(model: nn.Module) -> Tuple[Tuple[str, nn.Module], ...]:
    """Modules that are called; lists of modules never are."""
    return tuple((n, m) for n, m in model.named_modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict)))
