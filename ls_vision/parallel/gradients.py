"""Gradients of parameters that all ranks of an image have: their mean over the ranks.

Each rank differentiates with its own copy of a parameter, so that only the mean of all copies' gradients is that of the
unsplit model.
"""
from typing import Optional

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .link import Link


class GradientMean:
    """Averages the gradients of a model's parameters over the ranks of an image, before anybody sees them."""

    def __init__(self, link: Link):
        self.link = link
        self._known = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo) -> 'GradientMean':
        return GradientMean(self.link)  # copied parameters have no hooks

    def follow(self, model: nn.Module) -> None:
        """Also averages the gradients of parameters that are new, or were frozen, in the last call."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._known and not isinstance(parameter, DTensor):
                parameter.register_hook(self._mean)
                self._known[parameter] = True
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._follow_sharded(module)

    def _mean(self, grad: Tensor) -> Tensor:
        return self.link.sum(grad, 'gradients') / self.link.size

    def _follow_sharded(self, module: FSDPModule) -> None:
        """FSDP's own hook, where it does not average over the strips itself."""
        ranks = _ranks_of_shards(module)
        if ranks is None:
            return
        others = set(self.link.global_ranks) - {torch.distributed.get_rank()}
        if not others & ranks:
            module.set_all_reduce_hook(self._mean_in_place)
        elif not others <= ranks:
            raise ValueError(
                f'fully_shard has a mesh of ranks {sorted(ranks)}, of which the strips of one image are '
                f'{self.link.global_ranks}; expected a mesh of all of these, or of only one.')

    def _mean_in_place(self, grad: Tensor) -> None:
        grad.copy_(self._mean(grad))


def _ranks_of_shards(module: FSDPModule) -> Optional[set]:
    """The ranks over which FSDP averages gradients."""
    for parameter in module.parameters():  # type: ignore[attr-defined]
        if isinstance(parameter, DTensor):
            return set(parameter.device_mesh.mesh.flatten().tolist())
    return None
