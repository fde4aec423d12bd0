"""Annotated images, as every reader returns them, and the problems that a reader finds."""
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ..data.images import ImageError, check_header
from ..runtime.errors import UserError
from .values import BadValue

SHOWN = 50  # an error lists at most this many problems
LONGEST = 400  # characters of a problem's message


@dataclass
class Problem:
    """Something wrong in an annotation file."""
    file: str
    record: str  # position in the file; '' for the whole file
    message: str

    def __str__(self) -> str:
        """One line that every terminal can show, whatever the file holds."""
        message = self.message
        if len(message) > LONGEST:
            message = f'{message[:LONGEST // 2]} ... {message[-LONGEST // 4:]}'
        line = f'{self.file}: {self.record}{": " if self.record else ""}{message}'
        return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)


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
    notes: list[str] = field(default_factory=list)  # what a reader left out on purpose

    @property
    def num_objects(self) -> int:
        return sum(len(image.boxes) for image in self.images)

    @property
    def num_crowds(self) -> int:
        """Objects that neither training nor evaluation uses."""
        return sum(int(image.crowd.sum()) for image in self.images)


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


def find_image(folders: Sequence[Path], name: str) -> Path:
    """The file of a name in the first folder that has it.

    Names with Windows' backslashes, and in the other Unicode form (macOS decomposes accents), are found too.

    Raises:
        BadValue: There is none.
    """
    names = dict.fromkeys(
        form for spelling in (name, name.replace('\\', '/'))
        for form in (spelling, *(unicodedata.normalize(kind, spelling) for kind in ('NFC', 'NFD'))))
    for folder in folders:
        for form in names:
            if _is_file(folder / form):
                return folder / form
    also = ''.join(f', also from {folder}' for folder in folders[1:])
    raise BadValue(f'image file {folders[0] / name} is missing{also}')


def check_image(path: Path, width: int, height: int) -> None:
    """Read an image's header.

    Raises:
        BadValue: It cannot be read, or does not fit its annotation.
    """
    try:
        check_header(path, (width, height))
    except ImageError as e:
        raise BadValue(f'image file {path} {e}') from e


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # e.g. a name that is too long, or holds a null byte
        return False
