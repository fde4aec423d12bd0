"""Checks of COCO's segmentations: polygons, and run lengths as lists or as compressed text."""
from typing import Any, Optional

import numpy as np

from .values import EDGE, BadValue, show, whole

LONGEST = 13  # characters of a compressed run length: 64 bits in groups of five


def check_segmentation(value: Any, width: int, height: int) -> Optional[Any]:
    """The segmentation with its numbers as numbers; None where there is none.

    Args:
        value: Of an annotation.
        width, height: Of its image.

    Raises:
        BadValue: It is neither polygons within the image nor run lengths of its size, or it is empty.
    """
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, dict):
        return _check_run_lengths(value, width, height)
    if not isinstance(value, list):
        raise BadValue(f'segmentation {show(value)} is neither a list of polygons nor run lengths')
    return [_check_polygon(polygon, width, height) for polygon in value]


def _check_polygon(value: Any, width: int, height: int) -> list[float]:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        raise BadValue('segmentation is not a list of polygons of three points or more')
    try:
        points = np.array(value, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as e:
        raise BadValue(f'segmentation: polygon {show(value)} is not made of numbers') from e
    inside = (points >= -EDGE) & (points <= (width + EDGE, height + EDGE))
    if points.size != len(value) or not (inside.all() or np.isfinite(points).all()):
        raise BadValue(f'segmentation: polygon {show(value)} is not made of finite numbers')
    if not inside.all():
        raise BadValue(f'segmentation: polygon {show(value)} reaches outside the image of {width} x {height}')
    return points.ravel().tolist()


def _check_run_lengths(value: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    size, counts = value.get('size'), value.get('counts')
    if not isinstance(size, list) or len(size) != 2:
        raise BadValue(f'segmentation: run lengths need a `size` of height and width, found {show(size)}')
    size = [whole(side, 'segmentation: size') for side in size]
    if size != [height, width]:
        raise BadValue(f'segmentation: run lengths of size {size} (height, width), the image is {[height, width]}')
    if isinstance(counts, str):
        runs = _uncompress(counts)
    elif isinstance(counts, list):
        runs = counts = [whole(count, 'segmentation: run length') for count in counts]
    else:
        raise BadValue(f'segmentation: `counts` {show(counts)} is neither a list nor a text of run lengths')
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise BadValue(
            f'segmentation: run lengths add up to {sum(runs)} pixels, the image has {height} x {width}'
            if all(run >= 0 for run in runs) else 'segmentation: a run length is negative')
    if sum(runs[1::2]) == 0:
        raise BadValue('segmentation: its mask is empty')
    return dict(size=size, counts=counts)


def _uncompress(counts: str) -> list[int]:
    """Run lengths of COCO's text: groups of five bits, the low ones first; from the fourth on, differences."""
    runs: list[int] = []
    run = shift = 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift >= 5 * LONGEST:
            raise BadValue(f'segmentation: `counts` {show(counts)} is not a text of run lengths')
        run |= (group & 31) << shift
        shift += 5
        if group & 32:  # more groups follow
            continue
        if group & 16:  # negative
            run -= 1 << shift
        runs.append(run + (runs[-2] if len(runs) > 2 else 0))
        run = shift = 0
    if shift:
        raise BadValue(f'segmentation: `counts` {show(counts)} ends within a run length')
    return runs
