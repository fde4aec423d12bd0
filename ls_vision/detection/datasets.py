"""Annotated images as samples for training and for evaluation."""
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..data.images import CountsUnreadable, ImageError, map_pixels, read_image
from ..runtime.errors import UserError
from .annotations import Annotated, Annotations

CACHED_IMAGES = 4  # decoded images per process, so that crops of a large image decode it once


class DetectionDataset(CountsUnreadable, Dataset[Any]):
    """Images and targets for the training of a torchvision detector.

    Args:
        annotations: The images and their objects; crowds are left out.
        transform: Takes and returns the image and the target.
        with_masks: Include masks.
        crops_per_image: Samples of each image per epoch; they follow each other.
        skip_bad: Replace an image that cannot be decoded by the next one, and count it, instead of raising.
    """

    def __init__(
            self,
            annotations: Annotations,
            transform: Callable[[tv_tensors.Image, dict[str, Any]], tuple[Tensor, dict[str, Any]]],
            with_masks: bool = False,
            crops_per_image: int = 1,
            skip_bad: bool = False,
    ):
        super().__init__(len(annotations.images))
        self.annotations, self.transform = annotations, transform
        self.with_masks, self.crops_per_image = with_masks, crops_per_image
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.annotations.images) * self.crops_per_image

    @property
    def class_names(self) -> list[str]:
        return self.annotations.class_names

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image, pixels = self._read(index)
        size = (image.height, image.width)
        kept = ~image.crowd
        target: dict[str, Any] = dict(
            boxes=tv_tensors.BoundingBoxes(
                torch.from_numpy(image.boxes[kept]).float(), format='XYXY', canvas_size=size),  # type: ignore[call-overload]
            labels=torch.from_numpy(image.labels[kept]))
        if self.with_masks:
            target['masks'] = tv_tensors.Mask(torch.from_numpy(read_masks(image)[kept]))
        return self.transform(tv_tensors.Image(pixels), target)

    def filename(self, index: int) -> str:
        """The file of an image, counted as in `unreadable`."""
        return str(self.annotations.images[index].path)

    def read(self, index: int) -> Tensor:
        """The pixels of an image, counted as in `unreadable`."""
        image = self.annotations.images[index]
        return read_pixels(image.path, (image.width, image.height))

    def _read(self, index: int) -> tuple[Annotated, Tensor]:
        """The image of a sample and its pixels, or those of the next one that can be decoded."""
        images, first = self.annotations.images, index // self.crops_per_image
        for place in (*range(first, len(images)), *range(first)):
            try:
                return images[place], self.read(place)
            except UserError:
                if not self.skip_bad:
                    raise
                self.unreadable[place] = 1
        raise UserError(f'none of the {len(images)} images of {self.annotations.source} can be decoded')


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Lists of images and targets, as plain tensors: images differ in size."""
    images = [image.as_subclass(Tensor) for image, _ in samples]
    return images, [{name: value.as_subclass(Tensor) for name, value in target.items()} for _, target in samples]


@lru_cache(maxsize=CACHED_IMAGES)
def read_pixels(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """(3, H, W) uint8; a crop of an uncompressed TIFF reads only its own part of the file.

    Args:
        path: Image file.
        size: Width and height of its annotation, which tell whether to turn it by its EXIF orientation.

    Raises:
        UserError: The file is damaged or does not fit; see `read_image`.
    """
    try:
        mapped = map_pixels(path, size)
        pixels = np.array(read_image(path, size=size)) if mapped is None else mapped
    except ImageError as e:
        raise UserError(f'image {path} {e}; --skip-bad continues without such images') from e
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_masks(image: Annotated) -> np.ndarray:
    """(N, H, W) uint8, of polygons or run lengths.

    Raises:
        UserError: The image's objects have no masks.
    """
    if image.segmentations is None:
        raise UserError(f'{image.path}: has objects without a segmentation, which Mask R-CNN needs')
    masks = np.zeros((len(image.segmentations), image.height, image.width), dtype=np.uint8)
    for mask, segmentation in zip(masks, image.segmentations, strict=True):
        mask[:] = _decode(segmentation, image)
    return masks


def _decode(segmentation: Any, image: Annotated) -> np.ndarray:
    from faster_coco_eval.core import mask as coco_mask

    if isinstance(segmentation, list) or isinstance(segmentation['counts'], list):
        segmentation = coco_mask.frPyObjects(segmentation, image.height, image.width)
    if isinstance(segmentation, list):  # parts of one object
        segmentation = coco_mask.merge(segmentation)
    return np.asarray(coco_mask.decode(segmentation))
