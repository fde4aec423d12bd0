"""Splitting a model: which layers compute on strips, and whose gradients are averaged over the strips."""
import zlib
from typing import Type, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers import SelectAdaptivePool2d
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..layers import FullAttention2d, LongShortAttention2d
from ..layers.projection import ConvQKV, ConvScores
from ..models._hierarchical import Stage
from .layers import STRIP_LAYERS, StripBlocks, StripDropout, StripLayer, StripPatchEmbed
from .link import WAIT_SECONDS, Link, check_mesh
from .strips import Strips

Model = TypeVar('Model', bound=nn.Module)

_LINEAR_VARIANTS = {
    'vil_ls_tiny': 'vil_ls_tiny_linear', 'vil_ls_small': 'vil_ls_small_linear', 'vil_ls_medium': 'vil_ls_medium_linear',
    'vil_ls_base': 'vil_ls_base_linear', 'vil_ls_medium_384': 'vil_ls_medium_linear', 'cvt_13': 'cvt_ls_13',
    'vil_full_medium': 'vil_ls_medium_linear', 'cvt_21': 'cvt_ls_21',
}


def parallelize(model: Model, mesh: DeviceMesh, timeout: float = WAIT_SECONDS) -> Model:
    """Splits a model over the devices of a mesh dimension, each of which takes a strip of the same images.

    Outputs, and every parameter's gradient after `backward`, are those of the unsplit model on the whole images.
    Logits are the same on every rank; feature maps are strips. Each rank differentiates its own loss, and gradients are
    the mean over the ranks, as in data parallelism: a loss of the logits, or of maps that `gather_maps` has joined,
    counts once. State dicts are those of the unsplit model. The first rank's weights are sent to the others.

    Args:
        model: A ViL-LS model with long-short attention in all stages, or a CvT-LS, for classification or
            `features_only`; it is changed in place.
        mesh: A `DeviceMesh` of one dimension. With data parallelism besides, the dimension of the strips of a larger
            one; wrap the model with DDP or `fully_shard` over the other dimension, or over all.
        timeout: Seconds after which a rank that another waits for in vain is given up (gloo; the process group's
            timeout on NCCL).

    Returns:
        The model.

    Raises:
        ValueError: The mesh has more than one dimension, or the model can't be split, or is another one on another
            rank.
    """
    check_mesh(mesh)
    check_model(model)
    link = Link(mesh, timeout)
    _check_same_model(model, link)
    _send_weights(model, link)
    _prepare(Strips(model, link, _prepare))
    return model


def check_model(model: nn.Module) -> None:
    """Raises ValueError where a model can't be split."""
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    modules = list(model.modules())
    if not any(isinstance(m, Stage) for m in modules):
        raise ValueError(f'model is {name}, expected a ViL-LS or CvT-LS model.')
    if any(isinstance(m, StripLayer) for m in modules):
        raise ValueError(f'{name} is split already.')
    if any(isinstance(m, FullAttention2d) for m in modules):
        variant = _LINEAR_VARIANTS.get(name, "a model with attn_types='long-short'")
        raise ValueError(
            f'{name} has stages with full attention, in which every token needs all others; expected {variant}.')
    for module in modules:
        if isinstance(module, SelectAdaptivePool2d) and module.pool_type not in ('avg', 'fast', ''):
            raise ValueError(f"{name} has global_pool {module.pool_type!r}, expected 'avg' or ''.")


def _check_same_model(model: nn.Module, link: Link) -> None:
    """Raises ValueError, on all ranks, where a rank has another model."""
    description = [(key, tuple(t.shape), str(t.dtype)) for key, t in model.state_dict().items()]
    settings = [
        (m.window_size, m.num_heads, m.scale, m.global_attention)
        for m in model.modules() if isinstance(m, LongShortAttention2d)]
    number = zlib.crc32(repr((description, settings)).encode())
    device = next(model.parameters()).device
    if device.type == 'meta':
        return
    numbers = link.gather(torch.tensor([number], device=device), 'checks').flatten().tolist()
    if len(set(numbers)) > 1:
        same = [i for i, n in enumerate(numbers) if n == numbers[0]]
        raise ValueError(f'Ranks of one image have different models: only ranks {same} have that of rank 0.')


@torch.no_grad()
def _send_weights(model: nn.Module, link: Link) -> None:
    """The first rank's weights to all, as DDP does; sharded ones are what `fully_shard` made of them."""
    for tensor in model.state_dict().values():
        if link.size > 1 and not isinstance(tensor, DTensor) and tensor.device.type != 'meta':
            dist.broadcast(tensor.detach(), src=link.global_ranks[0], group=link.group)


def _prepare(strips: Strips) -> None:
    """Makes layers compute on strips, and gradients be averaged; also those that have come since the last call."""
    for number, module in enumerate(strips.model.modules()):
        base = next((base for base in STRIP_LAYERS if isinstance(module, base)), None)
        if base is not None and not isinstance(module, StripLayer) and not _does_nothing(module):
            module.__class__ = _strip_class(type(module), base)
            layer = cast(StripLayer, module)
            layer.strips, layer.number = strips, number
    for i, stage in enumerate(strips.stages):
        cast(StripPatchEmbed, stage.patch_embed).stage = cast(StripBlocks, stage.blocks).stage = i
        for module in stage.modules():
            if isinstance(module, StripDropout):
                module.num_same = stage.num_global_tokens
            elif isinstance(module, (ConvQKV, ConvScores)):
                module.conv.padding = (0, 1)  # rows are padded with the neighbours'
        if stage.patch_embed.padding:
            stage.patch_embed.proj.padding = (0, stage.patch_embed.padding)
    strips.gradients.follow(strips.model)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0.


def _strip_class(cls: Type[nn.Module], base: Type[nn.Module]) -> Type[nn.Module]:
    """The class that a layer takes on; of a class that others made of ours, such as FSDP's, one made of both."""
    strip = STRIP_LAYERS[base]
    return strip if cls is base else type(f'Strip{cls.__name__}', (strip, cls), {})
