"""Annotated images as the detectors' data: what a reader gives, and the report of everything that is wrong with it."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..training.errors import UserError

SHOWN = 50  # problems that an error lists


@dataclass
class Problem:
    """Something wrong in an annotation file."""
    file: str
    record: str  # where in the file, '' for all of it
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
    crowd: np.ndarray  # (N,) bool: a group of objects; evaluation forgives what it matches, training leaves it out
    areas: np.ndarray  # (N,) float64, of the masks where there are masks
    segmentations: Optional[list[Any]] = None  # COCO polygons or run lengths, one for each object


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
    """Annotations that cannot be trusted; lists all that is wrong with them."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        lines = [f'  {problem}' for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f'  ... and {len(problems) - SHOWN} more')
        noun = 'problem' if len(problems) == 1 else 'problems'
        super().__init__(
            f'{source}: {len(problems)} {noun} in the annotations:\n' + '\n'.join(lines) +
            '\nCorrect them, or pass --skip-bad to go on without these records')


def read_annotations(
        path: str,
        image_dir: Optional[str] = None,
        class_names: Optional[Sequence[str]] = None,
        skip_bad: bool = False,
) -> Annotations:
    """Read and check COCO annotations (a .json file) or Pascal VOC annotations (an .xml file or a folder of them).

    Args:
        path: The annotations.
        image_dir: Folder of the images. By default the one that the annotations lie in, or its VOC or COCO sibling.
        class_names: Classes in the order of their labels, e.g. those of the training set; others are a problem. By
            default the file's categories by id (COCO) or all names by alphabet (VOC).
        skip_bad: Leave out bad records, and images that can't be read, instead of raising.

    Returns:
        The annotations, with the problems that were skipped.

    Raises:
        UserError: `path` does not exist or no image is left.
        AnnotationError: Something is wrong and `skip_bad` is false; lists every problem by file and record.
    """
    from .coco import read_coco
    from .voc import read_voc

    if not Path(path).exists():
        raise UserError(f'annotations {path} do not exist; expected a COCO .json file or VOC .xml files')
    if image_dir is not None and not Path(image_dir).is_dir():
        raise UserError(f'image folder {image_dir} does not exist')
    reader = read_coco if Path(path).suffix == '.json' else read_voc
    annotations = reader(Path(path), Path(image_dir) if image_dir is not None else None, class_names)
    annotations.source = path
    if annotations.problems and not skip_bad:
        raise AnnotationError(path, annotations.problems)
    if not annotations.images or not annotations.class_names:
        details = '\n'.join(f'  {problem}' for problem in annotations.problems[:SHOWN])
        raise UserError(f'{path}: no image or no class is left to read' + (f':\n{details}' if details else ''))
    return annotations


def check_image(path: Path, width: Any, height: Any) -> Optional[str]:
    """What is wrong with an image file, or None; only its header is read."""
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
    """What is wrong with (left, top, right, bottom) in an image, or None; a pixel beyond the edge is rounding."""
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
