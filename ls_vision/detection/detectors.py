"""torchvision's detectors on a timm backbone."""
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .backbone import PyramidBackbone

# One-stage detectors keep so many candidates for a detection at every level. torchvision's ratio: 1,000 for 100. With
# 1,000 candidates for 1,000 trees in a photograph half of the boxes were lost.
CANDIDATES = 10
FCOS_DISTANCE = 2.  # initial distance from a point to the sides of its box, in strides


class Normalize(GeneralizedRCNNTransform):
    """torchvision's preprocessing without resizing; its own `_skip_resize` works in training only."""

    def resize(self, image: Tensor, target: Optional[dict[str, Tensor]] = None) -> Any:
        return image, target


class Kind(NamedTuple):
    """The settings of a detector that depend on its family."""
    make: Callable[..., nn.Module]
    strides: tuple[int, ...]  # of the pyramid's levels; one-stage detectors usually start at 8
    prefix: str  # of torchvision's arguments on the resulting boxes
    score_thresh: float


DETECTORS = {
    'fcos': Kind(FCOS, (8, 16, 32), '', .05),
    'retinanet': Kind(RetinaNet, (8, 16, 32), '', .05),
    'faster_rcnn': Kind(FasterRCNN, (4, 8, 16, 32), 'box_', .05),
    'mask_rcnn': Kind(MaskRCNN, (4, 8, 16, 32), 'box_', .05),
}


def build_detector(
        detector: str,
        backbone: str = 'vil_ls_small_linear',
        num_classes: int = 80,
        strides: Optional[Sequence[int]] = None,
        out_channels: int = 256,
        trainable_stages: Optional[int] = None,
        grad_checkpointing: bool = False,
        min_size: Optional[Union[int, Sequence[int]]] = None,
        max_size: Optional[int] = None,
        detections_per_img: int = 100,
        backbone_kwargs: Optional[dict[str, Any]] = None,
        **detector_kwargs: Any,
) -> nn.Module:
    """A torchvision detector whose features come from any timm model.

    It is called like any of them: `losses = model(images, targets)` in training, `detections = model(images)` in
    evaluation, with images (3, H, W) from 0 to 1 of any sizes; labels count from 1.

    Args:
        detector: 'fcos', 'retinanet', 'faster_rcnn' or 'mask_rcnn'.
        backbone: timm model name.
        num_classes: Number of classes, without the background.
        strides: Strides of the backbone's feature maps that enter the pyramid. By default (8, 16, 32) for one-stage
            detectors, plus two coarser levels, and (4, 8, 16, 32) for the others, plus one coarser level.
        out_channels: Width of pyramid and heads, a multiple of 32. Group norms have 32 groups, and 16 where it is 32:
            one channel of one pixel has no statistics.
        trainable_stages: Stages of the backbone to train, counted from the last one; all if None.
        grad_checkpointing: Recompute the backbone's blocks in the backward pass: less memory, a third more time.
        min_size: Shorter side in pixels to which images are resized. In training it is drawn from several if these are
            given. None does not resize.
        max_size: Limit of the longer side where images are resized, 1333 by default.
        detections_per_img: Largest number of boxes per image. One-stage detectors keep ten candidates for each, and
            1,000 or more, at every level before non-maximum suppression (`topk_candidates`).
        backbone_kwargs: Arguments of `timm.create_model`, e.g. `drop_path_rate`, `pretrained` or `in_chans`. With one
            channel the backbone's pixel statistics are averaged, with more than three they are repeated.
        **detector_kwargs: Other arguments of the torchvision detector, e.g. `score_thresh`, `image_mean` or
            `size_divisible`.

    Raises:
        ValueError: An argument is out of range; names it and what is accepted.
    """
    if detector not in DETECTORS:
        raise ValueError(f'detector {detector!r}: must be one of {", ".join(DETECTORS)}')
    if num_classes < 1:
        raise ValueError(f'num_classes {num_classes}: must be 1 or more')
    if out_channels < 1 or out_channels % 32:
        raise ValueError(f'out_channels {out_channels}: must be a multiple of 32')
    if max_size is not None and min_size is None:
        raise ValueError(f'max_size {max_size}: images are resized only with min_size')
    kind = DETECTORS[detector]
    pyramid = PyramidBackbone(
        backbone, strides or kind.strides, out_channels, trainable_stages, grad_checkpointing,
        _extra_levels(kind, out_channels), **(backbone_kwargs or {}))
    mean, std = _pixel_statistics(pyramid.body.model, detector_kwargs)
    settings: dict[str, Any] = dict(
        num_classes=num_classes + 1,  # torchvision counts the background
        max_size=1333 if max_size is None else max_size,
        min_size=800 if min_size is None else min_size,
        **{f'{kind.prefix}detections_per_img': detections_per_img, f'{kind.prefix}score_thresh': kind.score_thresh},
        **_level_settings(kind, pyramid),
    )
    if not kind.prefix:
        settings['topk_candidates'] = max(CANDIDATES * detections_per_img, 1000)
    model: Any = kind.make(pyramid, **{**settings, **detector_kwargs, 'image_mean': mean, 'image_std': std})
    if min_size is None and detector_kwargs.get('fixed_size') is None:
        model.transform = Normalize(0, 0, mean, std, size_divisible=model.transform.size_divisible)
    _widen_groups(model)
    if isinstance(model, FCOS):
        # Distances leave the head through a ReLU. With a bias of 0 and a backbone without pretrained weights, all fell
        # to 0 within ten updates and boxes were never learned.
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, FCOS_DISTANCE)  # type: ignore[union-attr, arg-type]
    return model


def _pixel_statistics(backbone: Any, given: dict[str, Any]) -> list[list[float]]:
    """Mean and standard deviation of each channel: those given, or the backbone's.

    Raises:
        ValueError: The number given is not 1 or that of the channels.
    """
    channels = get_model_input_config(backbone)['input_size'][0]
    data_config = resolve_data_config(model=backbone)
    statistics = []
    for argument, name in (('image_mean', 'mean'), ('image_std', 'std')):
        found = given.get(argument)
        if found is not None and len(found) not in (1, channels):
            raise ValueError(f'{argument} {list(found)}: must be {channels} numbers, one for each channel, or one')
        if found is None:
            found = data_config[name] if channels > 1 else [sum(data_config[name]) / len(data_config[name])]
        statistics.append([found[i % len(found)] for i in range(channels)])
    return statistics


def _widen_groups(model: nn.Module) -> None:
    """Let every group norm of pyramid and heads, which have 32 groups, have two channels or more in a group."""
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and not name.startswith('backbone.body.'):
            module.num_groups = min(module.num_groups, module.num_channels // 2)


def _extra_levels(kind: Kind, out_channels: int) -> ExtraFPNBlock:
    return LastLevelMaxPool() if kind.prefix else LastLevelP6P7(out_channels, out_channels)


def _level_settings(kind: Kind, pyramid: PyramidBackbone) -> dict[str, Any]:
    """Anchors, with sizes proportional to the strides, and the levels from which regions are pooled."""
    extra = 1 if kind.prefix else 2
    strides = [*pyramid.strides, *(pyramid.strides[-1] * 2 ** (i + 1) for i in range(extra))]
    ratios = ((.5, 1., 2.),) * len(strides)
    if kind.make is FCOS:  # points rather than anchors, each as large as its stride
        return dict(anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.,),) * len(strides)))
    if kind.make is RetinaNet:  # three sizes per octave, from four times the stride on
        sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
        return dict(anchor_generator=AnchorGenerator(sizes, ratios))
    levels = [str(i) for i in range(len(pyramid.strides))]
    settings: dict[str, Any] = dict(
        rpn_anchor_generator=AnchorGenerator(tuple((8 * s,) for s in strides), ratios),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2))
    if kind.make is MaskRCNN:
        settings['mask_roi_pool'] = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    return settings
