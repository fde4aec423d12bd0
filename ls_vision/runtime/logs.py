"""Output of a run: a progress bar in a terminal, plain lines elsewhere, and the time of each kind of work."""
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .streams import without_reader


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return int(os.environ.get('RANK', '0')) == 0


def say(text: str) -> None:
    """Print a line above the progress bar, from the first process only."""
    if is_first_process():
        with without_reader(sys.stdout):
            tqdm.write(text)
            sys.stdout.flush()  # log files are read during the run


class ProgressBar:
    """Progress through the batches of one pass over the data.

    Args:
        title: Name of the pass, e.g. 'epoch 3/12'.
        total: Number of batches.
        log_interval: Batches between two printed lines where there is no terminal; 0 prints none.
        done: Batches of this pass that are already done, in a resumed run.
    """

    def __init__(self, title: str, total: int, log_interval: int = 0, done: int = 0):
        self.title = title
        self.total = total
        self.log_interval = log_interval
        self.done = done
        disable = None if is_first_process() else True  # None: where there is no terminal
        self.bar = tqdm(total=total, desc=title, unit='batch', leave=False, dynamic_ncols=True, initial=done,
                        disable=disable)

    def update(self, **figures: float) -> None:
        """Count a batch and show its figures."""
        self.done += 1
        text = ', '.join(f'{name} {value:.4g}' for name, value in figures.items())
        if not self.bar.disable:
            with without_reader(sys.stderr):
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update()
        elif self.log_interval and self.done % self.log_interval == 0:
            say(f'{self.title}: {self.done}/{self.total}, {text}')

    def close(self) -> None:
        with without_reader(sys.stderr):
            self.bar.close()

    def __enter__(self) -> 'ProgressBar':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stopwatch:
    """Seconds spent per kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def __str__(self) -> str:
        total = time.perf_counter() - self.start
        parts = ', '.join(f'{name} {seconds:.0f} s' for name, seconds in self.seconds.items())
        return f'{total:.0f} s ({parts})'
