"""Annotated images, as every reader returns them, and the problems that a reader finds."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..runtime.errors import UserError

SHOWN = 50  # an error lists at most this many problems


@dataclass
class Problem:
    """Something wrong in an annotation file."""
    file: str
    record: str  # position in the file; '' for the whole file
    message: str

    def __str__(self) -> str:
        return f'{self.file}: {self.record}{": " if self.record else ""}{self.message}'


@dataclass
class Annotated:
    """An image and its objects."""
    path: Path
    width: int
    height: int
    image_id: int
    boxes: np.ndarray  # (N, 4) float64: left, top, right, bottom in pixels from the corner
    labels: np.ndarray  # (N,) int64 from 1
    crowd: np.ndarray  # (N,) bool: a group of objects; ignored in evaluation, left out of training
    areas: np.ndarray  # (N,) float64, of the masks where there are masks
    segmentations: Optional[list[Any]] = None  # COCO polygons or run lengths, one per object


@dataclass
class Annotations:
    """A set of images with the names of its classes; label i is `class_names[i - 1]`."""
    images: list[Annotated]
    class_names: list[str]
    problems: list[Problem] = field(default_factory=list)
    source: str = ''

    @property
    def num_objects(self) -> int:
        return sum(len(image.boxes) for image in self.images)


class AnnotationError(UserError):
    """Annotations with problems; the message lists them."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        lines = [f'  {problem}' for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f'  ... and {len(problems) - SHOWN} more')
        noun = 'problem' if len(problems) == 1 else 'problems'
        super().__init__(
            f'{source}: {len(problems)} {noun} in the annotations:\n' + '\n'.join(lines) +
            '\nCorrect them, or pass --skip-bad to continue without these records')


def check_image(path: Path, width: Any, height: Any) -> Optional[str]:
    """The problem of an image file, or None; only its header is read."""
    if not path.is_file():
        return f'image file {path} is missing'
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        return f'image file {path} cannot be read: {e}'
    if size != (width, height):
        return f'image file {path} is {size[0]} x {size[1]}, its annotation says {width} x {height}'
    return None


def check_box(box: Any, width: float, height: float) -> Optional[str]:
    """The problem of a box (left, top, right, bottom), or None; one pixel beyond the edge counts as rounding."""
    left, top, right, bottom = box
    if not np.isfinite(box).all():
        return f'box {_round(box)} is not finite'
    if right <= left or bottom <= top:
        return f'box {_round(box)} has zero or negative area'
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
        return f'box {_round(box)} (left, top, right, bottom) reaches outside the image of {width} x {height}'
    return None


def _round(box: Any) -> list[float]:
    return [round(float(value), 2) for value in box]
