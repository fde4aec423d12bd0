"""Which backbone to take: time and memory of models at one image size, measured as far as time and memory allow.

What is too large to measure is estimated: time from smaller sizes by multiply-adds, memory as `analysis.memory` does.
"""
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from tqdm import tqdm

from ls_vision.analysis.flops import count_quickly
from ls_vision.analysis.memory import count_parameters, inference_memory, training_memory
from ls_vision.analysis.worker import FAILURES, Point, Settings, visit
from ls_vision.analysis.zoo import PUBLISHED, ImageSize, Published, size_name
from ls_vision.runtime.errors import UserError, first_line

SMALL = 256 * 256
"""Pixels of one image that are measured without a prediction."""

STEP_SECONDS = 1.5
"""Time of measuring a size that is only a step towards the one that is asked for."""


class Wish(NamedTuple):
    """What the model is for."""
    img_size: ImageSize
    batch_size: int
    mode: str
    memory: int
    """Bytes that it may take at its peak."""


@dataclass
class Candidate:
    """A model and what is known of it."""
    model: str
    wish: Wish
    params: int = 0
    macs: int = 0
    predicted_memory: Optional[int] = None
    visits: dict[Point, list[dict[str, Any]]] = field(default_factory=dict)
    """Results of `visit` by what was measured, from small to large."""
    reason: Optional[str] = None
    """Why it is no choice."""
    is_examined: bool = False

    @property
    def point(self) -> Point:
        """What is asked for."""
        return Point(self.model, self.wish.img_size, self.wish.batch_size, self.wish.mode)

    @property
    def is_choice(self) -> bool:
        return self.is_examined and self.reason is None

    @property
    def last(self) -> Point:
        """The largest that was measured."""
        return list(self.visits)[-1]

    @property
    def is_measured(self) -> bool:
        """Whether time and memory are those at the size itself."""
        return self.point in self.visits

    @property
    def basis(self) -> list[Point]:
        """What the time rests on: the size itself, or the two largest that were measured."""
        return [self.point] if self.is_measured else list(self.visits)[-2:]

    def seconds(self, point: Point) -> float:
        """Median time of a call: measured, or else on the line through the two largest that were, by multiply-adds.

        The line's start is the time that does not depend on the image, such as that of AdamW's update. Where noise puts
        it below zero, the time is in proportion.
        """
        times = {p: statistics.median(s for r in results for s in r['seconds']) for p, results in self.visits.items()}
        if point in times:
            return times[point]
        *before, last = times
        slope = times[last] / work(last)
        if before:
            rise = (times[last] - times[before[-1]]) / (work(last) - work(before[-1]))
            slope = rise if 0 < rise < slope else slope
        return times[last] + slope * (work(point) - work(last))

    @property
    def memory(self) -> Optional[int]:
        """Peak in bytes: measured, or else predicted."""
        if self.is_measured:
            return max(result['memory'] for result in self.visits[self.point])
        return self.predicted_memory

    @property
    def published(self) -> Optional[Published]:
        """Accuracy; None for other weights than those that were published."""
        found = PUBLISHED.get(self.model.split('.')[0])
        return found if found and ('.' not in self.model or self.model == found.weights) else None

    def as_dict(self) -> dict[str, Any]:
        """A row for JSON."""
        known = bool(self.visits)
        return dict(
            self.wish._asdict(), memory=self.memory, memory_asked=self.wish.memory, model=self.model,
            is_choice=self.is_choice, reason=self.reason, params=self.params, macs=self.macs,
            seconds=self.seconds(self.point) if known else None, is_measured=self.is_measured,
            measured_at=self.last._asdict() if known else None, predicted_memory=self.predicted_memory,
            published=self.published and self.published._asdict())


def compare(candidates: Sequence[Candidate], settings: Settings, free: int) -> None:
    """Examines all candidates, and measures again backwards, so that load on the machine affects all alike.

    Args:
        candidates: Results go into them at once; an interrupt leaves what is complete.
        settings: Where and how to measure. A size whose call would take longer than its seconds is estimated.
        free: Bytes that the device has; larger models are estimated.

    Raises:
        UserError: Not one is a choice.
    """
    with tqdm(total=2 * len(candidates), desc='examining', unit='model', disable=None) as progress:
        for candidate in candidates:
            progress.set_postfix_str(candidate.model)
            examine(candidate, settings, free)
            progress.update()
        for candidate in reversed(candidates):
            progress.set_postfix_str(candidate.model)
            for point in candidate.basis if candidate.is_choice else ():
                measure(candidate, point, settings)
            progress.update()
    if not any(candidate.is_choice for candidate in candidates):
        raise UserError(explain(candidates))


def examine(candidate: Candidate, settings: Settings, free: int) -> None:
    """The first round: what the model needs, and its time at the largest size that can be measured."""
    try:
        candidate.macs = count_quickly(candidate.model, candidate.wish.img_size)
        candidate.params = count_parameters(candidate.model, candidate.wish.img_size)
        steps = [*reversed(list(smaller(candidate.point))), candidate.point]
        if len(steps) > 1:
            candidate.predicted_memory = predict(candidate, steps, settings)
        if candidate.predicted_memory is not None and candidate.predicted_memory > free:
            steps.pop()
        check_memory(candidate)
        while candidate.reason is None:
            point = next_step(candidate, steps, settings.seconds)
            if point is None:
                break
            measure(candidate, point, settings)
    except FAILURES as e:
        candidate.reason = first_line(e).removeprefix(f'{candidate.model} ')
    candidate.is_examined = True


def smaller(point: Point) -> Iterator[Point]:
    """Ever smaller ones, each about a quarter of the pixels: smaller batches down to one image, then smaller images."""
    while point.batch_size > 1 or point.img_size[0] * point.img_size[1] > SMALL:
        if point.batch_size > 1:
            point = point._replace(batch_size=max(1, point.batch_size // 4))
        else:
            height, width = (min(side, -(-side // 64) * 32) for side in point.img_size)  # models want multiples of 32
            point = point._replace(img_size=(height, width))
        yield point


def predict(candidate: Candidate, steps: Sequence[Point], settings: Settings) -> Optional[int]:
    """Bytes at the peak; for inference two small sizes are measured first. None where one of them failed."""
    name, (size, batch_size, mode, _) = candidate.model, candidate.wish
    if mode == 'training':
        return training_memory(name, size, batch_size, settings)
    single = [step for step in steps if step.batch_size == 1 and step != candidate.point][:2]
    for step in single:
        measure(candidate, step, settings)
        if candidate.reason is not None:
            return None
    peaks = {step.img_size: candidate.visits[step][0]['memory'] for step in single}
    return inference_memory(name, size, batch_size, peaks, settings)


def next_step(candidate: Candidate, steps: Sequence[Point], seconds: float) -> Optional[Point]:
    """The two smallest steps, then the largest whose call takes no longer, as far as is known; None at the end."""
    if len(candidate.visits) < min(2, len(steps)):
        return steps[len(candidate.visits)]
    known = steps.index(candidate.last)
    return next((step for step in reversed(steps[known + 1:]) if candidate.seconds(step) <= seconds), None)


def measure(candidate: Candidate, point: Point, settings: Settings) -> None:
    """Adds a visit or, where it failed, the reason."""
    if point != candidate.point:
        settings = settings._replace(seconds=min(settings.seconds, STEP_SECONDS))
    result = visit(point, settings)
    if result['status'] == 'ok':
        candidate.visits.setdefault(point, []).append(result)
        check_memory(candidate)
    else:
        batch = f', batch {point.batch_size}' if point.batch_size > 1 else ''
        candidate.reason = f'{result.get("message", result["status"])} at {size_name(point.img_size)}{batch}'


def check_memory(candidate: Candidate) -> None:
    """Refuses a model that needs more memory than was asked for."""
    memory = candidate.memory
    if memory is not None and memory > candidate.wish.memory:
        about = '' if candidate.is_measured else 'about '
        candidate.reason = f'needs {about}{memory_name(memory)}'


def work(point: Point) -> int:
    """Multiply-adds of the forward pass."""
    return point.batch_size * count_quickly(point.model, point.img_size)


def explain(candidates: Sequence[Candidate]) -> str:
    """Why not one is a choice."""
    wish = candidates[0].wish
    known = [(c.memory, c.model) for c in candidates if c.memory is not None and c.memory > wish.memory]
    if known:
        least, model = min(known)
        return (
            f'--memory {memory_name(wish.memory)}: none of {len(candidates)} models fits; {model} needs least, '
            f'{memory_name(least)}')
    first = candidates[0]
    return (
        f'--img-size {size_name(wish.img_size)}: none of {len(candidates)} models can be measured; '
        f'{first.model}: {first.reason}')


def memory_name(number: int) -> str:
    """Bytes as text, in MiB or GiB."""
    return f'{number / 2 ** 30:.2f} GiB' if number >= 2 ** 30 else f'{number / 2 ** 20:.0f} MiB'
