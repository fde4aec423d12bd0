"""The one parser of values in annotation files: numbers, flags and names, as JSON and XML of many tools hold them."""
import math
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST = 2 ** 63  # ids and sizes are 64-bit numbers in every later step
NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?', re.ASCII)  # float() would also take nan, inf and 1_0
FLAGS = {'1': True, 'true': True, 'yes': True} | dict.fromkeys(('0', 'false', 'no', '', 'unspecified'), False)
EDGE = 1  # pixels beyond the image that count as rounding

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 60
_brief.maxlist = 8


class BadValue(ValueError):
    """A value that cannot be used; the message names it and says what is accepted."""


def show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return _brief.repr(value)


def number(value: Any, name: str) -> float:
    """A finite number, also written as text."""
    found = value
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        found = float(value.strip())
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise BadValue(f'{name} {show(value)} is not a number')
    try:
        found = float(found)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise BadValue(f'{name} {show(value)} is not finite')
    return found


def whole(value: Any, name: str) -> int:
    """A whole number of 64 bits, also written as text or as 100.0."""
    found = value
    if isinstance(value, str) and re.fullmatch(r'[+-]?\d{1,19}', value.strip(), re.ASCII):
        found = int(value)  # not through a float, which would round long ids
    if isinstance(found, bool) or not isinstance(found, int):
        rounded = number(value, name)
        if not rounded.is_integer():
            raise BadValue(f'{name} {show(value)} is not a whole number')
        found = int(rounded)
    if abs(found) >= LARGEST:
        raise BadValue(f'{name} {show(value)} is too large: whole numbers have up to 64 bits')
    return found


def flag(value: Any, name: str) -> bool:
    """0 or 1, as a number, a truth value or a text; a missing one is 0."""
    if value is None:
        return False
    if isinstance(value, str):
        found = FLAGS.get(value.strip().lower())
        if found is not None:
            return found
    elif isinstance(value, bool):
        return value
    try:
        found_number = number(value, name)
    except BadValue as e:
        raise BadValue(f'{name} {show(value)} is neither 0 nor 1') from e
    if found_number not in (0, 1):
        raise BadValue(f'{name} {show(value)} is neither 0 nor 1')
    return bool(found_number)


def text(value: Any, name: str) -> str:
    """A text that is not empty, without white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise BadValue(f'{name} {show(value)} is not a text')
    return value.strip()


def class_name(value: Any, name: str = 'name') -> str:
    """The name of a class; composed and decomposed Unicode are the same name."""
    return unicodedata.normalize('NFC', text(value, name))


def clip_box(corners: Sequence[float], width: int, height: int) -> np.ndarray:
    """A box (left, top, right, bottom) in pixels, (4,) float64, clipped to the image.

    Raises:
        BadValue: It is not finite, reaches more than a pixel beyond the image, or no area is left within it.
    """
    left, top, right, bottom = corners
    if not all(map(math.isfinite, corners)):
        raise BadValue(f'box {_round(corners)} is not finite')
    if right <= left or bottom <= top:
        raise BadValue(f'box {_round(corners)} has zero or negative area')
    if left < -EDGE or top < -EDGE or right > width + EDGE or bottom > height + EDGE:
        raise BadValue(
            f'box {_round(corners)} (left, top, right, bottom) reaches outside the image of {width} x {height}')
    box = np.array([min(max(value, 0), side) for value, side in zip(corners, (width, height) * 2, strict=True)], float)
    sides = box[2:].astype(np.float32) - box[:2].astype(np.float32)  # the detectors' precision
    if sides[0] <= 0 or sides[1] <= 0:
        raise BadValue(f'box {_round(corners)} has zero area within the image of {width} x {height}')
    return box


def _round(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]
