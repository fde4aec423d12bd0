"""Augmentation of images with boxes and masks: torchvision's transforms, and two that it lacks."""
import math
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Sample = tuple[tv_tensors.Image, dict[str, Any]]

MIN_VISIBLE = .3  # share of an object's box that a crop must show to keep the object


class RandomScaleCrop(nn.Module):
    """A random square crop at a random scale.

    Only the cropped region is resized, so the time does not depend on the size of the image. If a side of the image is
    shorter than the crop, the whole side is taken.

    Args:
        size: Side of the result in pixels.
        scale: Smallest and largest magnification.
    """

    def __init__(self, size: int, scale: Sequence[float] = (1., 1.)):
        super().__init__()
        self.size, self.scale = size, scale

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        low, high = (math.log(v) for v in self.scale)
        magnify = math.exp(torch.empty(()).uniform_(low, high).item()) if high > low else self.scale[0]
        window = [min(max(round(self.size / magnify), 1), side) for side in image.shape[-2:]]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(image.shape[-2:], window))
        crop = (top, left, window[0], window[1])
        full = target['boxes']
        target = keep_objects({**target, 'boxes': F.crop(full, *crop)}, shown(full, F.crop(full, *crop)) >= MIN_VISIBLE)
        size = [min(max(round(part * magnify), 1), self.size) for part in window]
        resized = {
            name: F.resize(value if name == 'boxes' else F.crop(value, *crop), size)
            for name, value in target.items() if name in ('boxes', 'masks')}
        return F.resize(F.crop(image, *crop), size, antialias=True), {**target, **resized}


class RandomTranspose(nn.Module):
    """Exchange of rows and columns; with both flips it gives all eight orientations of an aerial photograph."""

    def __init__(self, p: float = .5):
        super().__init__()
        self.p = p

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        if torch.rand(()) >= self.p:
            return image, target
        height, width = image.shape[-2:]
        boxes = target['boxes']
        swapped = tv_tensors.BoundingBoxes(
            boxes[:, [1, 0, 3, 2]], format='XYXY', canvas_size=(width, height))  # type: ignore[call-overload]
        out = {**target, 'boxes': swapped}
        if 'masks' in target:
            out['masks'] = tv_tensors.Mask(target['masks'].transpose(-2, -1))
        return tv_tensors.Image(image.transpose(-2, -1)), out


def shown(full: Tensor, cropped: Tensor) -> Tensor:
    """Share of each box's area that remains."""
    sides = full[:, 2:] - full[:, :2]
    left = cropped[:, 2:] - cropped[:, :2]
    return left.clamp(min=0).prod(1) / sides.prod(1).clamp(min=1e-6)


def keep_objects(target: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """The target with some of its objects."""
    out = dict(target)
    for name in ('boxes', 'labels', 'masks'):
        if name in target:
            out[name] = tv_tensors.wrap(target[name][keep], like=target[name])
    return out


def create_train_transform(
        crop_size: int | None,
        crop_scale: Sequence[float],
        hflip: float,
        vflip: float,
        transpose: float,
        color_jitter: float,
        photometric_distort: float = 0.,
) -> Callable[[tv_tensors.Image, dict[str, Any]], Sample]:
    """The augmentation of training images; parts with a probability or strength of 0 are left out."""
    parts: list[nn.Module] = []
    if crop_size is not None:
        parts.append(RandomScaleCrop(crop_size, crop_scale))
    if hflip:
        parts.append(v2.RandomHorizontalFlip(hflip))
    if vflip:
        parts.append(v2.RandomVerticalFlip(vflip))
    if transpose:
        parts.append(RandomTranspose(transpose))
    if color_jitter:
        parts.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if photometric_distort:
        parts.append(v2.RandomPhotometricDistort(p=photometric_distort))
    parts += [v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True), v2.SanitizeBoundingBoxes()]
    return v2.Compose(parts)
