"""The image size from which one model costs less than another."""
import math
from collections.abc import Mapping
from typing import Optional

Curve = Mapping[float, Optional[float]]
"""Cost by side of the image in pixels; None where the model ran out of memory."""


def crossover(ours: Curve, theirs: Curve) -> Optional[float]:
    """The side from which the first model costs less at every measured size.

    Between two measured sizes it is the intersection of the straight lines of log cost against log side. It is the
    smallest side if the first model always costs less, and None if it does not at the largest side.
    """
    sides = sorted(set(ours) & set(theirs))
    first = len(sides)
    while first > 0 and _less(ours[sides[first - 1]], theirs[sides[first - 1]]):
        first -= 1
    if first == len(sides):
        return None
    side = sides[first]
    if first == 0:
        return side
    before = sides[first - 1]
    costs = ours[before], theirs[before], ours[side], theirs[side]
    if any(cost is None for cost in costs):
        return side
    above, below = _log_ratio(costs[0], costs[1]), _log_ratio(costs[2], costs[3])
    share = above / (above - below)
    return math.exp(math.log(before) + share * (math.log(side) - math.log(before)))


def describe(ours: Curve, theirs: Curve) -> str:
    """Where the first model costs less, as the end of a sentence: 'from about 530 px on'."""
    sides = sorted(set(ours) & set(theirs))
    side = crossover(ours, theirs)
    if not sides:
        return 'not compared: no common size'
    if side is None:
        less = [f'{side:.0f}' for side in sides if _less(ours[side], theirs[side])]
        return f'only at {", ".join(less)} px' if less else f'at no size up to {sides[-1]:.0f} px'
    if side == sides[0]:
        return f'at every size, {sides[0]:.0f} to {sides[-1]:.0f} px'
    return f'from {"" if side in sides else "about "}{side:.0f} px on'


def _less(ours: Optional[float], theirs: Optional[float]) -> bool:
    return ours is not None and (theirs is None or ours < theirs)


def _log_ratio(ours: Optional[float], theirs: Optional[float]) -> float:
    assert ours is not None and theirs is not None
    return math.log(ours / theirs)
