"""Measuring: alternating calls, ratios within a round, peak memory, and files of results."""
import contextlib
import datetime
import json
import math
import os
import platform
import random
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from ls_vision.runtime.files import write_text


def alternate(
        calls: dict[str, Callable[[], Any]],
        seconds: float,
        device: str = 'cpu',
        min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds of all calls in random order, after one warm-up round."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    order = list(calls)
    rng = random.Random(0)
    end = None
    rounds = 0
    with tqdm(total=seconds, desc='timing', unit='s', leave=False, disable=None,
              bar_format='{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s') as progress:
        while end is None or time.perf_counter() < end or rounds < min_rounds:
            rng.shuffle(order)
            begin = time.perf_counter()
            for kind in order:
                synchronize()
                start = time.perf_counter()
                calls[kind]()
                synchronize()
                if end is not None:
                    times[kind].append(time.perf_counter() - start)
            if end is None:
                end = time.perf_counter() + seconds
            else:
                rounds += 1
                progress.update(time.perf_counter() - begin)
    return times


def ratio(times: list[float], others: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of times from the same round."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return dict(median=median, quartile_1=low, quartile_3=high)


def spread(result: dict[str, float]) -> str:
    """A ratio and its quartiles as text."""
    return f'{result["median"]:.2f} ({result["quartile_1"]:.2f} to {result["quartile_3"]:.2f})'


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x, by least squares."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def added_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call adds at its peak: of the allocator on a GPU, otherwise of the resident size."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = peak_resident_size(reset=True)
    call()
    return peak_resident_size() - before


def peak_resident_size(reset: bool = False) -> int:
    """Peak resident size of this process in bytes. With `reset` the peak is reset first, where possible (Linux)."""
    if reset:
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')
    for line in Path('/proc/self/status').read_text().splitlines() if Path('/proc/self/status').exists() else ():
        if line.startswith('VmHWM'):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def describe_machine(device: str, dtype: str, threads: int) -> dict[str, Any]:
    """Hardware, software and command of a measurement."""
    name = torch.cuda.get_device_name() if device == 'cuda' else cpu_name()
    return dict(
        device=name, cores=os.cpu_count(), dtype=dtype, threads=threads, torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version(), date=f'{datetime.date.today()}', command=command_line())


def command_line() -> str:
    """The command that started this process, as far as it is known."""
    script = Path(sys.argv[0])
    installed = script.name == 'ls-vision' or script.parts[-2:] == ('ls_vision', '__main__.py')
    return shlex.join([*(['ls-vision'] if installed else ['python', sys.argv[0]]), *sys.argv[1:]])


def cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]], markdown: str) -> None:
    """Writes PATH.json and PATH.md; the Markdown begins with the machine and the command."""
    head = ', '.join(f'{k} {v}' for k, v in machine.items() if k != 'command')
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (('.json', json.dumps(dict(machine=machine, rows=rows), indent=1)),
                         ('.md', f'{head}\n\n`{machine["command"]}`\n\n{markdown}')):
        write_text(path.with_name(path.name + suffix), text + '\n')


def write_as_measured(
        path: Path,
        machine: dict[str, Any],
        measured: Iterable[dict[str, Any]],
        markdown: Callable[[list[dict[str, Any]]], str],
        rows: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes PATH.json and PATH.md after every row, and prints the table at the end or after Ctrl-C.

    Args:
        path: Without suffix.
        machine: From `describe_machine`.
        measured: Rows, each measured when it is asked for.
        markdown: Makes the table.
        rows: Those of an earlier run.
    """
    found = list(rows)
    try:
        for row in measured:
            found.append(row)
            write(path, machine, found, markdown(found))
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
    print(path.with_name(f'{path.name}.md').read_text() if found else 'Nothing was measured.')
