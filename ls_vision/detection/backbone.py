"""A timm model with a feature pyramid, in the form that torchvision's detectors expect."""
from functools import partial
from typing import Any, Optional, Sequence

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

NORM_GROUPS = 32  # of the pyramid's group norm, as in torchvision's detection heads


class PyramidBackbone(nn.Module):
    """A timm model whose feature maps are projected to one width and merged from the coarsest to the finest.

    Group norm follows every convolution of the pyramid: the scale of a transformer's feature maps varies, and a
    detector's batches are small.
    """

    def __init__(
            self,
            name: str,
            strides: Sequence[int] = (4, 8, 16, 32),
            out_channels: int = 256,
            trainable_stages: Optional[int] = None,
            grad_checkpointing: bool = False,
            extra_blocks: Optional[ExtraFPNBlock] = None,
            **model_kwargs: Any,
    ):
        """
        Args:
            name: timm model name.
            strides: Strides in pixels of the model's feature maps that enter the pyramid, the finest first.
            out_channels: Width of the pyramid.
            trainable_stages: Stages to train, counted from the last one; the others are frozen. All if None.
            grad_checkpointing: Recompute the activations of the model's blocks in the backward pass.
            extra_blocks: Levels on top of the pyramid.
            **model_kwargs: Arguments of `timm.create_model`.

        Raises:
            ValueError: The model lacks a feature map, or has fewer stages than `trainable_stages`.
        """
        super().__init__()
        # 'getter' returns NCHW maps for every model, and keeps the model's own gradient checkpointing.
        model_kwargs = {**_any_image_size(name), **model_kwargs}
        body: Any = timm.create_model(
            name, features_only=True, feature_cls='getter', out_indices=_find_levels(name, strides, model_kwargs),
            **model_kwargs)
        self.body = body
        if trainable_stages is not None:
            freeze_stages(body.model, trainable_stages)
        if grad_checkpointing:
            body.model.set_grad_checkpointing(True)
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), out_channels, extra_blocks, partial(nn.GroupNorm, NORM_GROUPS))
        self.out_channels = out_channels
        self.strides = tuple(strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> (B, out_channels, H / stride, W / stride) by level, the finest first."""
        return self.fpn({str(i): x for i, x in enumerate(self.body(images))})


def freeze_stages(model: Any, trainable_stages: int) -> None:
    """Freeze all but the last stages of a timm model, the statistics of its batch norms included.

    Raises:
        ValueError: `trainable_stages` is not between 0 and the number of the model's feature maps.
    """
    # Parameters are registered in the order of the stages, the stem first; unused stages have been removed.
    names = [name for name, _ in model.named_parameters()]
    stages = [info['module'] for info in model.feature_info if any(n.startswith(f'{info["module"]}.') for n in names)]
    if not 0 <= trainable_stages <= len(stages):
        raise ValueError(f'trainable_stages {trainable_stages}: must be 0 to {len(stages)}, the number of stages')
    if trainable_stages == len(stages):
        return
    last = stages[len(stages) - 1 - trainable_stages]
    end = 1 + max((i for i, name in enumerate(names) if name.startswith(f'{last}.')), default=-1)
    frozen = set(names[:end])
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and f'{name}.weight' in frozen:
            model.set_submodule(name, freeze_batch_norm_2d(module))


def _find_levels(name: str, strides: Sequence[int], model_kwargs: dict[str, Any]) -> list[int]:
    """Indices of the feature maps with these strides; the last one where several have the same stride."""
    with torch.device('meta'):
        model: Any = timm.create_model(name, **{**model_kwargs, 'pretrained': False, 'checkpoint_path': ''})
    index = {info['reduction']: i for i, info in enumerate(model.feature_info)}
    if not strides or list(strides) != sorted(set(strides)) or not set(strides) <= index.keys():
        raise ValueError(f'strides {tuple(strides)}: {name} has feature maps of strides {sorted(index)}; '
                         'pass some of them, the finest first')
    return [index[stride] for stride in strides]


def _any_image_size(name: str) -> dict[str, bool]:
    """The argument that makes timm's fixed-size models accept any image size."""
    return dict(strict_img_size=False) if name.startswith('swin') else {}
