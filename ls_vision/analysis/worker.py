"""Time and peak memory of one model at one size, in a process of its own that may run out of memory."""
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ls_vision.analysis.measure import peak_resident_size
from ls_vision.analysis.zoo import ImageSize, build
from ls_vision.runtime.devices import is_out_of_memory
from ls_vision.runtime.errors import UserError, first_line

MODES = ('inference', 'training')
FAILURES = (UserError, AssertionError, MemoryError, RuntimeError, ValueError)
"""What models raise that cannot run at a size."""


class Point(NamedTuple):
    """What is measured."""
    model: str
    img_size: ImageSize
    batch_size: int
    mode: str
    """One of `MODES`: a forward pass without gradients, or forward, backward and an AdamW update."""


class Settings(NamedTuple):
    """How it is measured."""
    device: str
    dtype: str
    threads: int
    seconds: float
    """Time of the repeated calls; a call that takes longer is measured once."""
    memory_limit: int
    """Bytes that a process on the CPU may allocate; beyond that it is 'out of memory'."""


def visit(point: Point, settings: Settings) -> dict[str, Any]:
    """Measures a point in a fresh process.

    Returns:
        `status` 'ok' with `seconds` of each call and `memory` in bytes at the peak; 'out of memory'; or 'failed' with
        `message`.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])  # so that processes start fast
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(point, settings, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it was killed
        process.join()
        if process.exitcode == -9:  # by the system's out-of-memory killer
            return dict(status='out of memory')
        return dict(status='failed', message=f'the process ended with {process.exitcode}')
    finally:
        process.kill()
        process.join()


def _work(point: Point, settings: Settings, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        result = measure(point, settings)
    except FAILURES as e:
        result = dict(status='out of memory') if is_out_of_memory(e) else dict(status='failed', message=first_line(e))
    sender.send(result)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def measure(point: Point, settings: Settings) -> dict[str, Any]:
    """Measures a point in this process; see `visit`.

    Memory is that of weights, gradients, optimiser and activations. On a GPU it is the allocator's peak, on the CPU the
    peak resident size minus the resident size before the model was built.
    """
    torch.set_num_threads(settings.threads)
    _warm_up_libraries(settings.device)
    gc.collect()
    before = 0 if settings.device == 'cuda' else peak_resident_size(reset=True)
    with _memory_limit(settings):
        call = _prepare(point, settings)
        if settings.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        else:
            peak_resident_size(reset=True)  # ignore the initialisation of the weights
        seconds = _time(call, settings)
    peak = torch.cuda.max_memory_allocated() if settings.device == 'cuda' else peak_resident_size()
    return dict(status='ok', seconds=seconds, memory=peak - before)


def _warm_up_libraries(device: str) -> None:
    """Load what libraries set up on first use before memory is measured."""
    layers = nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)
    model = nn.Sequential(*layers).to(device)
    model(torch.randn(2, 3, 32, 32, device=device)).sum().backward()


def _prepare(point: Point, settings: Settings) -> Callable[[], Any]:
    """The call to measure."""
    torch.manual_seed(0)
    model = build(point.model, point.img_size).to(settings.device)
    images = torch.randn(point.batch_size, 3, *point.img_size, device=settings.device)
    dtype = getattr(torch, settings.dtype)
    if point.mode == 'inference':
        model.eval().to(dtype)
        images = images.to(dtype)

        @torch.inference_mode()
        def infer() -> None:
            model(images)
        return infer

    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    _create_moments(optimizer)

    def train() -> None:
        training_loss(model, images, settings).backward()
        optimizer.step()
        optimizer.zero_grad()
    return train


def training_loss(model: nn.Module, images: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The loss of a training step, in mixed precision where the settings ask for it."""
    dtype = getattr(torch, settings.dtype)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images), targets)


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """What the first update allocates, so that the memory of a single step is that of every later one."""
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _time(call: Callable[[], Any], settings: Settings) -> list[float]:
    """Seconds of each call after a warm-up call; only of that one where it takes longer than `settings.seconds`."""
    def timed_call() -> float:
        start = time.perf_counter()
        call()
        if settings.device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = timed_call()
    if first > settings.seconds:
        return [first]
    times = [timed_call()]
    while sum(times) < settings.seconds:
        times.append(timed_call())
    return times


@contextmanager
def _memory_limit(settings: Settings) -> Iterator[None]:
    """Makes allocations beyond the limit fail, on the CPU, before the system kills a process."""
    if settings.device == 'cuda':
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_memory(device: str = 'cpu') -> Optional[int]:
    """Bytes that processes can still allocate, on the CPU without swapping; None where the system does not say."""
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0]
    try:
        with open('/proc/meminfo') as file:
            lines = dict(line.split(':') for line in file)
        return int(lines['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError):
        return None
