"""Does long-short attention work on this machine, and with which backend? One check after the other, for a report.

As a program, `python -m ls_vision.analysis.doctor`, it writes a line of JSON to stdout before and after each check, so
that whoever started it knows which check ended it: an illegal memory access on a GPU harms no other process.
"""
import functools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Optional

import timm
import torch
from torch import Tensor

from ls_vision._version import __version__
from ls_vision.analysis.zoo import own_models
from ls_vision.layers import LongShortAttention2d
from ls_vision.ops.attention import attend
from ls_vision.ops.backends import BACKEND_ENV, BACKENDS, probe, resolve, triton
from ls_vision.ops.backends.probe import Problem
from ls_vision.ops.backends.reference import reference_attention
from ls_vision.ops.backends.triton.trial import TRIAL_ENV, Kind, attempt
from ls_vision.ops.backends.triton.tuning import AUTOTUNE_ENV
from ls_vision.ops.window import make_window, square_window
from ls_vision.runtime.errors import first_line

ENVIRONMENT = (BACKEND_ENV, TRIAL_ENV, AUTOTUNE_ENV, 'TRITON_INTERPRET', 'CUDA_VISIBLE_DEVICES', 'CUDA_LAUNCH_BLOCKING')


class Skipped(Exception):
    """Why a check can't be done here."""


def facts() -> dict[str, Any]:
    """Versions, devices and settings, by name."""
    found: dict[str, Any] = {
        'ls_vision': __version__, 'torch': torch.__version__, 'timm': timm.__version__,
        'triton': _triton_version(), 'python': platform.python_version(), 'system': platform.platform(),
        'CUDA of torch': torch.version.cuda, 'C compiler': shutil.which('cc') or shutil.which('gcc'),
        'GPUs': [_describe_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        'float32 products': torch.backends.cuda.matmul.fp32_precision,
        'deterministic algorithms': torch.are_deterministic_algorithms_enabled(),
    }
    return {**found, **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name of each check and a function that gives a word on its outcome, and raises if it fails."""
    yield 'default backend', functools.partial(_name_default, device)
    backends = ('triton', 'blocked') if device.type == 'cuda' else ('blocked',)
    for backend in backends:
        for problem in zoo_problems():
            for dtype in probe.DTYPES:
                name = f'{backend}, {str(dtype).removeprefix("torch.")}, {problem}'
                yield name, functools.partial(compare, backend, problem, dtype, device)
    for sums in zoo_sums() if device.type == 'cuda' else ():
        for dtype in probe.DTYPES:
            name = f'sums over all tokens, {str(dtype).removeprefix("torch.")}, {sums}'
            yield name, functools.partial(try_sums, sums, dtype, device)
    yield 'compiled training step in bfloat16', functools.partial(_train_compiled, device)
    yield 'CUDA graph', functools.partial(_capture, device)
    yield 'second GPU', functools.partial(_use_second, device)


@functools.cache
def zoo_problems() -> list[Problem]:
    """What the layers of all registered models ask for, and one of 1280 channels in 16 heads."""
    found = {Problem(80, square_window(2), 4, False)}
    for layer in _zoo_layers():
        found.add(Problem(
            layer.dim // layer.num_heads, make_window(layer.window_size), layer.rank + layer.num_global_tokens,
            layer.position_bias() is not None))
    return sorted(problem for problem in found if problem.window.rows > 0)


@functools.cache
def zoo_sums() -> list[probe.Sums]:
    """The sums over all tokens that the layers of all registered models ask for."""
    found = set()
    for layer in _zoo_layers():
        d, r, g = layer.dim // layer.num_heads, layer.rank, layer.num_global_tokens
        if r > 0:
            found.add(probe.Sums(d, r, 2, False))
        if g > 0:
            found.add(probe.Sums(d, g, 1 if layer.global_attention == 'post' else 2, True))
    return sorted(found)


def _zoo_layers() -> Iterator[LongShortAttention2d]:
    """Of all registered models, without memory."""
    for name in own_models():
        with torch.device('meta'):
            model = timm.create_model(name)
        yield from (layer for layer in model.modules() if isinstance(layer, LongShortAttention2d))


def try_sums(problem: probe.Sums, dtype: torch.dtype, device: torch.device) -> str:
    """Kernels of the long-range half against portable operations.

    Raises:
        Skipped: The kernels can't run here.
        AssertionError: They raise or differ.
    """
    reason = triton.long_range.why_not(probe.draw_sums(problem, dtype, device).tokens, problem.rows)
    if reason is not None:
        raise Skipped(reason)
    found = attempt(Kind(device, dtype, problem))
    assert found is None, found
    return 'as portable operations'


def compare(backend: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> str:
    """Outputs and gradients of a small ragged problem against the dense reference in float64.

    Raises:
        Skipped: The backend can't compute it here.
        AssertionError: An error is larger than rounding makes it.
    """
    inputs = probe.draw(problem, dtype, device)
    reason = BACKENDS[backend].why_not(inputs.query, problem.window, True, False)
    if reason is not None:
        raise Skipped(reason)
    exact = probe.Inputs(*(None if x is None else x.double() for x in inputs))  # type: ignore[arg-type]
    actual = _differentiate(functools.partial(attend, backend=backend), problem, inputs)
    expected = _differentiate(reference_attention, problem, exact)
    error, name = probe.largest_error(('output', *probe.GRADIENTS), actual, expected)
    tolerance = probe.tolerance(dtype, device)
    assert error <= tolerance, f'{name}: an error of {error:.1e} of the largest entry, expected up to {tolerance}'
    return f'largest error {error:.1e}'


def _differentiate(
        function: Callable[..., Any],
        problem: Problem,
        inputs: probe.Inputs,
) -> list[Optional[Tensor]]:
    """The output and the gradients of all inputs, None of those that there are not."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs[:-1]]
    query, pair, additional, bias = leaves
    out, _ = function(query, pair, problem.window, additional, bias, problem.head_dim ** -0.5)
    found = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], inputs.grad, materialize_grads=True))
    return [out.detach(), *(None if x is None else next(found) for x in leaves)]


def _name_default(device: torch.device) -> str:
    query = torch.zeros(1, 7, 7, 1, 32, device=device)
    chosen = resolve(None, query, square_window(7), None, None, True, False)
    reason = BACKENDS['triton'].why_not(query, square_window(7), True, False)
    return chosen.name + (f' (not triton: {reason})' if reason else '')


def _needs_gpu(device: torch.device) -> None:
    if device.type != 'cuda':
        raise Skipped('needs a GPU')


def _small_model(device: torch.device) -> torch.nn.Module:
    return timm.create_model('vil_ls_tiny_linear', img_size=64, depths=(1, 1, 1, 1)).to(device)


def _train_compiled(device: torch.device) -> str:
    _needs_gpu(device)
    model, x = _small_model(device), torch.randn(2, 3, 64, 64, device=device)
    losses = []
    for step in (model, torch.compile(model)):
        with torch.autocast('cuda', dtype=torch.bfloat16):
            loss = step(x).float().logsumexp(-1).mean()
        loss.backward()
        losses.append(float(loss))
    assert abs(losses[0] - losses[1]) <= 1e-2 * abs(losses[0]), f'loss {losses[1]}, uncompiled {losses[0]}'
    return f'loss {losses[1]:.4f}, uncompiled {losses[0]:.4f}'


def _capture(device: torch.device) -> str:
    _needs_gpu(device)
    model, x = _small_model(device).eval(), torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
    torch.testing.assert_close(out, expected)
    return 'replayed, as without'


def _use_second(device: torch.device) -> str:
    _needs_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skipped('there is one GPU')
    problem = zoo_problems()[0]
    return compare('triton', problem, torch.float32, torch.device('cuda', 1))  # while the first is the current one


def _triton_version() -> Optional[str]:
    try:
        import triton
        return triton.__version__
    except Exception as e:  # whatever a broken installation raises
        return f'does not import: {type(e).__name__}: {first_line(e)}'


def _describe_gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return (
        f'{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2 ** 30:.0f} GiB, '
        f'{getattr(gpu, "shared_memory_per_block_optin", 0) // 1024} KiB of shared memory a block, '
        f'driver {getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()}')


def main() -> None:
    """Runs all checks; a line of JSON for the facts, for each check that begins, and for its outcome."""
    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    say(facts=facts())
    for name, check in checks(device):
        say(begins=name)
        try:
            outcome, detail = 'ok', check()
            if device.type == 'cuda':
                torch.cuda.synchronize()
        except Skipped as e:
            outcome, detail = 'skipped', str(e)
        except Exception as e:
            outcome, detail = 'failed', f'{type(e).__name__}: {first_line(e)}'
        say(check=name, outcome=outcome, detail=detail)
    say(end=True)


if __name__ == '__main__':
    main()
