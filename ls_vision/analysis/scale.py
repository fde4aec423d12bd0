"""Measures models over image sizes; every result is saved at once, so that an interrupted run can be resumed."""
import contextlib
import json
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from ls_vision.analysis.flops import count
from ls_vision.analysis.measure import describe_machine
from ls_vision.analysis.worker import Point, Settings, visit
from ls_vision.analysis.zoo import ImageSize, size_name
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import write_text

FINAL = ('ok', 'out of memory')
"""States in which a point is not measured again."""


def plan(
        models: Sequence[str],
        sizes: Sequence[ImageSize],
        batch_sizes: Sequence[int],
        modes: Sequence[str],
) -> list[Point]:
    """All points, small images first, so that an interrupted run has complete sizes; otherwise in random order."""
    points = [
        Point(model, size, batch_size, mode)
        for model in models for size in sizes for batch_size in batch_sizes for mode in modes]
    points = list(dict.fromkeys(points))
    random.Random(0).shuffle(points)
    return sorted(points, key=lambda p: p.img_size[0] * p.img_size[1])


class Results:
    """The measured points of a run; the file always has the same content."""

    def __init__(self, path: Path, machine: dict[str, Any], settings: Settings, rows: Sequence[dict[str, Any]] = ()):
        self.path = path
        self.machine = machine
        self.settings = settings
        self.rows = list(rows)

    @classmethod
    def create(cls, path: Path, settings: Settings, resume: bool) -> 'Results':
        """New results or, with `resume`, those of a file from this machine and with the same settings.

        Raises:
            UserError: The file exists and is not to be resumed, or cannot be.
        """
        machine = describe_machine(settings.device, settings.dtype, settings.threads)
        if not path.exists():
            return cls(path, machine, settings)
        if not resume:
            raise UserError(f'{path} already has results; continue with --resume, or name another folder with --out')
        results = cls.load(path)
        for name in ('device', 'dtype', 'threads', 'torch', 'timm'):
            if results.machine[name] != machine[name]:
                raise UserError(
                    f'{path} was measured with {name} {results.machine[name]}, now it is {machine[name]}: the results '
                    f'would not be comparable; name another folder with --out')
        return cls(path, results.machine, settings, results.rows)

    @classmethod
    def load(cls, path: Path) -> 'Results':
        """Raises UserError where the file is not one of results."""
        try:
            content = json.loads(path.read_text())
            return cls(path, content['machine'], Settings(**content['settings']), content['rows'])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path} does not hold results of `ls-vision scale`: {e}') from e

    def save(self) -> None:
        """Replaces the file as a whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = dict(machine=self.machine, settings=self.settings._asdict(), rows=self.rows)
        write_text(self.path, json.dumps(content, indent=1) + '\n')

    def find(self, point: Point) -> Optional[dict[str, Any]]:
        """The point's row, if it has one."""
        key = (point.model, list(point.img_size), point.batch_size, point.mode)
        return next((r for r in self.rows if (r['model'], r['img_size'], r['batch_size'], r['mode']) == key), None)

    def add(self, point: Point, result: dict[str, Any], costs: dict[str, int]) -> None:
        """Adds the result of a visit to the row of its point, and saves."""
        row = self.find(point)
        if row is None:
            row = dict(point._asdict(), img_size=list(point.img_size), **costs, visits=[])
            self.rows.append(row)
        row.update({name: value for name, value in result.items() if name in ('status', 'message')})
        if result['status'] == 'ok':
            row['visits'].append(dict(seconds=result['seconds'], memory=result['memory']))
            row.update(summarize(row))
        self.save()


def summarize(row: dict[str, Any]) -> dict[str, Any]:
    """Median and quartiles of all calls of all visits, images per second, and the highest peak of memory in bytes."""
    seconds = [s for visited in row['visits'] for s in visited['seconds']]
    low, median, high = statistics.quantiles(seconds, n=4, method='inclusive') if len(seconds) > 1 else seconds * 3
    return dict(
        latency=median, latency_quartiles=[low, high], throughput=row['batch_size'] / median,
        memory=max(visited['memory'] for visited in row['visits']))


def measure_points(points: Iterable[Point], results: Results, rounds: int) -> None:
    """Measures every point once per round, so that other load on the machine affects all models alike.

    Points that already have all their visits, or ran out of memory, are skipped.
    """
    points = list(points)
    missing = [(number, point) for number in range(rounds) for point in points if _is_missing(results, point, number)]
    costs = count_all([point for _, point in missing], results)
    with _progress(missing) as progress:
        for number, point in progress:
            if _is_missing(results, point, number):
                progress.set_postfix_str(
                    f'{point.model} {size_name(point.img_size)} {point.mode}', refresh=True)
                results.add(point, visit(point, results.settings), costs[point.model, point.img_size])


def _is_missing(results: Results, point: Point, number: int) -> bool:
    row = results.find(point)
    if row is None:
        return True
    return row['status'] not in FINAL or (row['status'] == 'ok' and len(row['visits']) <= number)


def count_all(points: Sequence[Point], results: Results) -> dict[tuple[str, ImageSize], dict[str, int]]:
    """Parameters and multiply-adds of one image, for each model and size."""
    costs = {
        (row['model'], tuple(row['img_size'])): dict(params=row['params'], macs=row['macs']) for row in results.rows}
    for model, size in tqdm(
            dict.fromkeys((p.model, p.img_size) for p in points), desc='counting', leave=False, disable=None):
        if (model, size) not in costs:
            counted = count(model, size)
            costs[model, size] = dict(params=counted.params, macs=counted.macs)
    return costs


@contextlib.contextmanager
def _progress(missing: Sequence[Any]) -> Iterator[Any]:
    with tqdm(missing, desc='measuring', unit='visit', disable=None) as progress:
        yield progress
