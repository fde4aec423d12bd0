"""The Triton kernels against the dense reference, in Triton's interpreter or on a GPU, and compiled for GPUs.

Whether kernels are interpreted is decided when Triton is imported, which other tests may have done. So this file is
also a program: tests start it once with and once without the interpreter, and exchange lines of JSON with it.
"""
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from ls_vision.analysis.compiled_kernels import SHARED_MEMORY, SUM_KERNELS, WINDOW_KERNELS, compile_kernel
from ls_vision.ops.attention import long_short_attention, without_padding
from ls_vision.ops.backends.reference import reference_attention
from ls_vision.ops.backends.triton import launch as launcher
from ls_vision.ops.backends.triton import tuning
from ls_vision.ops.window import Window, make_window, num_keys, num_queries

pytest.importorskip('triton')

# largest error of the output, and of gradients as a fraction of their largest entry
TOLERANCE = {'float32': (1e-5, 1e-5), 'float16': (2e-3, 4e-3), 'bfloat16': (3e-2, 3e-2)}

KERNELS = WINDOW_KERNELS


# ---- the program: commands from stdin, answers to stdout ----------------------------------------------------------


def main():
    functions = (
        measure, measure_sums, contracts, whole_model, spills, launch, broken, nan_spreads, padded, large_peaks,
        unneeded, tf32)
    commands = {function.__name__: function for function in functions}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop('do')](**command)), flush=True)


def to_window(w):
    """Of what JSON makes of a window: a size, two of them, or two and two margins."""
    return Window(*w) if isinstance(w, (list, tuple)) and len(w) == 4 else make_window(w)


def draw(w, d, M, bias, H, W, B=2, h=2, dtype='float32', size=1.0, device='cpu'):
    """Arguments of an attention call, as slices of projections like the layers', and its output's gradient."""
    window = to_window(w)
    generator = torch.Generator().manual_seed(window.rows * 1000 + d)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def tokens(*shape):
        x = (randn(B, H * W + 2, *shape, h, d) * size).to(device, dtype)
        x[:, [0, -1]] = float('nan')  # other tokens, which are not to be read
        return x[:, 1:-1].unflatten(1, (H, W))

    dtype = getattr(torch, dtype)
    query, pair = tokens(), tokens(2)
    additional = None if M is None else (randn(B, M, 2, h, d) * size).to(device, dtype)
    bias = randn(h, num_queries(window), num_keys(window)).to(device) if bias else None
    grad = randn(B, H, W, h, d).to(device, dtype)
    return (query, pair, window, additional, bias, d ** -0.5), grad


def draw_padding(share, grad):
    """A random mask of about that share of the tokens, all of the first image's for 'image'; None for None."""
    if share is None:
        return None
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(grad.shape[:3], generator=generator) < (.3 if share == 'image' else share)
    if share == 'image':
        mask[0] = True
    return mask.to(grad.device)


def measure(blocks=None, grad_size=1.0, padding=None, **case):
    """Errors of out, lse and gradients as fractions of their largest entries, out's also absolute; are they finite?

    With `blocks`, those are used, and sums are split among few programs, so that each has several steps.
    """
    with contextlib.ExitStack() as stack:
        if blocks is not None:
            patch = functools.partial(mock.patch.object, launcher)
            stack.enter_context(patch('_blocks', lambda *_: (launcher.Blocks(*blocks),)))
            stack.enter_context(patch('_REDUCTION_PROGRAMS', 2))
        arguments, grad = draw(**case)
        mask = draw_padding(padding, grad)
        return compare(arguments, without_padding(grad * grad_size, mask), mask)


def compare(arguments, grad, padding):
    with launcher.poisoned():
        out, statistics = launcher.forward(*arguments, False, padding)
        grads = launcher.backward(grad, None, *arguments, out, statistics, [True] * 4, padding)
    lse = statistics.sum(0)

    # the bias may be float32 beside half precision, in which kernels take it
    exact = [x.to(grad.dtype).float().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected, expected_lse = reference_attention(*exact, padding=padding)
    tensors = [exact[i] for i in (0, 1, 3, 4)]
    expected_grads = iter(torch.autograd.grad(
        expected, [x for x in tensors if x is not None], grad.float(), materialize_grads=True))

    assert out.isfinite().all() and lse.isfinite().all()
    if padding is not None:  # of no meaning there
        out, expected = without_padding(out, padding), without_padding(expected, padding)
        lse, expected_lse = (x.masked_fill(padding.unsqueeze(1), 0.) for x in (lse, expected_lse))
    errors = {'out': (out, expected), 'lse': (lse, expected_lse)}
    for name, x, actual in zip(
            ('query', 'pair', 'additional', 'bias'), (arguments[i] for i in (0, 1, 3, 4)), grads, strict=True):
        assert (x is None) == (actual is None), name
        if x is not None:
            errors[name] = actual, next(expected_grads)
            assert actual.shape == x.shape and actual.is_contiguous() and actual.dtype == x.dtype, name
    result = {'finite': all(bool(x.isfinite().all()) for x, _ in errors.values())}
    for name, (actual, exact) in errors.items():
        if exact.numel():
            difference = (actual.float() - exact).abs().max()
            result[name] = float(difference / exact.abs().max().clamp(min=1e-30))
    result['absolute'] = float((out.float() - expected).abs().max())
    return result


def draw_sums(d, r, kinds, N, B=2, h=2, dtype='float32', size=1.0):
    """Tokens, scores, queries and own keys as layers slice them from longer tensors; gradients of sums and lse."""
    generator = torch.Generator().manual_seed(N + d)
    dtype = getattr(torch, dtype)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) * size).to(dtype)

    tokens, scores = randn(B, N + 2, kinds, h, d), randn(B, N + 1, h * r)
    tokens[:, [0, -1]] = float('nan')  # other tokens, which are not to be read
    scores[:, 0] = float('nan')
    tokens, scores = tokens[:, 1:-1], scores[:, 1:].transpose(1, 2).reshape(B, h, r, N)
    grads = torch.randn(B, r, 2, h, d, generator=generator).to(dtype), torch.randn(B, r, h, generator=generator)
    return tokens, scores, randn(B, r, h, d), randn(B, r, 2, h, d), grads


def differentiate(function, inputs, grads):
    """What a function gives, and its gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(grads, outputs)])]


def measure_sums(**case):
    """Errors of summaries and of global attention, and of their gradients, as fractions of the largest entries."""
    tokens, scores, query, own, (grad, grad_lse) = draw_sums(**case)
    kinds, scale = tokens.shape[2], 0.4

    def summaries(scores, tokens):
        return torch.einsum('bhrn,bnkhd->brkhd', scores.softmax(-1), tokens), scores.logsumexp(-1).transpose(1, 2)

    def attention(query, own, tokens):
        k, v = (torch.cat([own[:, :, i], tokens[:, :, i]], 1) for i in (0, -1))
        logits = torch.einsum('bghd,bnhd->bhgn', query, k) * scale
        return torch.einsum('bhgn,bnhd->bghd', logits.softmax(-1), v), logits.logsumexp(-1).transpose(1, 2)

    def kernel_sums(scores, tokens):
        sums, statistics = torch.ops.ls_vision.fused_summarize(scores, tokens)
        return sums, statistics.sum(0)

    def kernel_attention(query, own, tokens):
        out, statistics = torch.ops.ls_vision.fused_global_attention(query, own, tokens, scale)
        return out, statistics.sum(0)

    errors = {}
    for name, kernels, formula, inputs, grads in (
            ('summaries', kernel_sums, summaries, (scores, tokens), (grad[:, :, :kinds], grad_lse)),
            ('global tokens', kernel_attention, attention, (query, own, tokens), (grad[:, :, 0], grad_lse))):
        with launcher.poisoned():
            actual = differentiate(kernels, inputs, grads)
        expected = differentiate(formula, [x.double() for x in inputs], grads)
        errors[name] = [
            float((a.double() - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True)]
    return errors


def contracts():
    """Fake tensors, autograd and compilers understand the operators; second derivatives are finite differences."""
    tokens, scores, query, own, _ = draw_sums(d=8, r=2, kinds=2, N=7, B=1, h=1)
    tokens, scores, query, own = (x.contiguous().requires_grad_() for x in (tokens, scores, query, own))
    ops = torch.ops.ls_vision
    torch.library.opcheck(ops.fused_summarize.default, (scores, tokens))
    torch.library.opcheck(ops.fused_global_attention.default, (query, own, tokens, .4))
    answers = []
    for function, inputs in (
            (lambda s, t: ops.fused_summarize(s, t)[0], (scores, tokens)),
            (lambda q, o, t: ops.fused_global_attention(q, o, t, .4)[0], (query, own, tokens))):
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        answers.append(all(bool(x.isfinite().all()) and bool(x.any()) for x in second))
    return answers


def whole_model():
    """Largest errors of a model's gradients by the kernels on a pretended GPU, eager and compiled in one graph, as
    fractions of the largest entries of those by portable operations."""
    import timm

    import ls_vision  # noqa: F401 (registers the models)
    from ls_vision.ops import backends

    torch.manual_seed(0)
    model = timm.create_model(
        'vil_ls_tiny_linear', img_size=32, embed_dims=(16,) * 4, depths=(1,) * 4, num_heads=2, window_size=2, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * .1)
    x = torch.randn(2, 3, 32, 32)

    def gradients(function):
        model.zero_grad()
        function(x).logsumexp(-1).mean().backward()
        # a shift of all scores changes no softmax: that gradient is 0
        return {name: p.grad.clone() for name, p in model.named_parameters()
                if p.grad is not None and 'to_dynamic_projection.bias' not in name}

    expected, errors = gradients(model), []
    with mock.patch.object(backends, '_prefers_triton', lambda query: True):
        for function in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
            found = gradients(function)
            errors.append(max(
                float((found[n] - e).abs().max() / e.abs().max().clamp(min=1e-4)) for n, e in expected.items()))
    return errors


def spills(kernel, arch, dtype, window_size=7, **case):
    """Compiles a kernel with each of its block shapes -> bytes spilled, registers and shared memory of each."""
    return [compiled._asdict() for compiled in compile_kernel(
        kernel, arch, getattr(torch, dtype), window_size=to_window(window_size), **case)]


def launch(tune=False, padding=None, **case):
    """Everything that launches do on a GPU up to the launch itself, on a pretended one -> versions of each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget('cuda', 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    def compile_only(function, *args, warmup, **kwargs):
        return run(function, *args, warmup=True, **kwargs)

    def first_of(run, shape):
        run(shape)
        return 1.

    triton.runtime.driver.set_active(Driver())
    run = triton.runtime.JITFunction.run
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, 'run', compile_only))
        if tune:
            os.environ[tuning.AUTOTUNE_ENV] = '1'
            stack.enter_context(mock.patch.object(tuning, '_time', first_of))
        before = compiled_versions()
        arguments, grad = draw(**case)
        mask = draw_padding(padding, grad)
        out, statistics = launcher.forward(*arguments, False, mask)
        launcher.backward(grad, None, *arguments, out, statistics, [True] * 4, mask)
        return [after - count for after, count in zip(compiled_versions(), before, strict=True)]


def nan_spreads():
    """Which gradients are NaN where a query is: of the values that it weights, too."""
    arguments, grad = draw(w=2, d=16, M=None, bias=True, H=4, W=4, B=1, h=1)
    query, pair, *rest = arguments
    query[0, 0, 0] = float('nan')
    out, statistics = launcher.forward(query, pair, *rest, False)
    grads = launcher.backward(grad, None, query, pair, *rest, out, statistics, [True] * 4)
    return [bool(grads[1][0, 0, 0, kind].isnan().all()) for kind in (0, 1)]


def padded(M):
    """Output, log-sum-exp and gradients of an image that is all padding and one with some, by kernels and portably.

    Of the log-sum-exp, which has no meaning where a token is padding, only the others are kept.
    """
    (query, pair, window, additional, bias, scale), grad = draw(w=(1, 4), d=16, M=M, bias=True, H=2, W=9, h=1)
    padding, answers = draw_padding('image', grad), []
    for backend in ('triton', 'blocked'):
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (query, pair, additional, bias)]
        query, pair, additional, bias = leaves
        more = (None, None) if additional is None else additional.unbind(2)
        out, lse = long_short_attention(
            query, *pair.unbind(3), window, *more, bias, scale, backend=backend, return_lse=True,
            key_padding_mask=padding)
        lse = lse.masked_fill(padding.unsqueeze(1), 0.)
        losses = (out * grad).sum(), (out * grad).sum() + lse.square().sum()
        tensors = [x for x in leaves if x is not None]
        grads = [torch.autograd.grad(loss, tensors, retain_graph=True) for loss in losses]
        answers.append([out, lse, *itertools.chain(*grads)])
    return [[bool(x.isfinite().all()), float((x - y).abs().max() / y.abs().max())] for x, y in zip(*answers)]


def large_peaks():
    """Largest error of the gradients with logits of 10,000 that differ by a few, as a fraction of the largest entry."""
    (query, pair, window, *_), grad = draw(w=2, d=16, M=None, bias=False, H=4, W=4, B=1, h=1)
    # multiples of a quarter: products and their sums are exact in float32
    query, pair = (query * 4).round() / 4, (pair * 4).round() / 4
    query[..., 0] = pair[..., 0, :, 0] = 128.
    arguments = query, pair, window, None, None, 1.
    out, statistics = launcher.forward(*arguments, False)
    grads = launcher.backward(grad, None, *arguments, out, statistics, [True] * 4)
    exact = [x.double().requires_grad_() for x in (query, pair)]
    expected, _ = reference_attention(*exact, *arguments[2:])
    expected = torch.autograd.grad(expected, exact, grad.double())
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(grads, expected))


def unneeded():
    """Kernels that are launched where only some gradients are needed, and which gradients there are."""
    launched, run = [], launcher.launch

    def record(name, *args, **kwargs):
        launched.append(name)
        run(name, *args, **kwargs)

    (query, pair, window, additional, bias, scale), grad = draw(w=2, d=16, M=3, bias=True, H=4, W=4, B=1, h=1)
    query, pair, additional, bias = (x.clone() for x in (query, pair, additional, bias))
    answers = {}
    for needed in ('query', 'pair', 'additional', 'bias'):
        tensors = dict(query=query, pair=pair, additional=additional, bias=bias)
        for name, x in tensors.items():
            x.requires_grad_(name == needed)
        out, _ = torch.ops.ls_vision.long_short_attention(
            query, pair, additional, bias, window, scale, 'triton', False)
        launched.clear()
        with mock.patch.object(launcher, 'launch', record):
            out.backward(grad)
        answers[needed] = list(launched), [name for name, x in tensors.items() if x.grad is not None]
        tensors[needed].grad = None
    return answers


def tf32():
    """Precision of products after each way to allow TF32."""
    matmul = torch.backends.cuda.matmul
    answers = []
    for precision in ('none', 'tf32', 'ieee', 'high'):
        if precision == 'high':
            torch.set_float32_matmul_precision(precision)
        elif precision != 'none':
            matmul.fp32_precision = precision
        answers.append(launcher.constants(16, make_window(7), 0, False, False, torch.float32)['PRECISION'])
    return answers


def broken(how):
    """Trains on a pretended GPU with kernels that are broken -> warnings, and the largest difference of gradients."""
    import warnings

    import timm

    import ls_vision  # noqa: F401 (registers the models)
    from ls_vision.ops import backends

    def raise_error(*args, **kwargs):
        raise {'compile': RuntimeError('Failed to find C compiler'), 'exception': OSError('libcuda.so cannot be found'),
               'import': ImportError('libtriton.so')}[how]

    def wrong(*args, **kwargs):
        grads = backward(*args, **kwargs)
        return (grads[0], grads[1] + 1., *grads[2:])

    backward = launcher.backward
    patches = {
        'compile': (launcher, 'launch', raise_error), 'exception': (launcher, 'forward', raise_error),
        'wrong': (launcher, 'backward', wrong), 'import': (launcher.importlib, 'import_module', raise_error)}
    model = timm.create_model(
        'vil_ls_tiny', img_size=32, embed_dims=(16,) * 4, depths=(1,) * 4, num_heads=2, window_size=2, rank=2)
    x, losses = torch.randn(2, 3, 32, 32), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, '_prefers_triton', lambda query: True))
        stack.enter_context(mock.patch.object(*patches[how]))
        found = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter('always')
        optimizer = torch.optim.SGD(model.parameters(), lr=.01)
        for _ in range(3):
            loss = model(x).logsumexp(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    return {'warnings': [str(w.message) for w in found if 'Triton' in str(w.message)], 'losses': losses}


def compiled_versions():
    return [len(launcher.kernel(kernel).device_caches[0][0]) for kernel in KERNELS]


# ---- the tests ----------------------------------------------------------------------------------------------------


class Program:
    """This file as a program, with or without Triton's interpreter."""

    def __init__(self, cache, **environment):
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
        self.process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONPATH': path, 'TRITON_CACHE_DIR': str(cache), **environment})

    def __call__(self, do, **arguments):
        self.process.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, 'the program failed, see its traceback on stderr'
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope='module')
def interpreter(tmp_path_factory):
    program = Program(tmp_path_factory.mktemp('triton'), TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    yield program
    program.close()


@pytest.fixture(scope='module')
def compiler(tmp_path_factory):
    program = Program(tmp_path_factory.mktemp('triton'), TRITON_INTERPRET='0')
    yield program
    program.close()


def check(errors, dtype='float32'):
    out, gradient = TOLERANCE[dtype]
    assert errors.pop('finite')
    assert errors.pop('absolute') <= out, errors
    assert errors.pop('lse') <= (1e-5 if dtype == 'float32' else 1e-4), errors
    assert max(errors.values()) <= gradient, errors


# every window size that models use, a tile of several windows and one cut off at the grid's edge in each
CASES = [
    dict(w=1, d=16, M=1, bias=True, H=9, W=5, h=1),
    dict(w=2, d=20, M=4, bias=False, H=9, W=11),
    dict(w=2, d=16, M=5, bias=True, H=9, W=7),
    dict(w=3, d=8, M=0, bias=True, H=7, W=8, h=1),
    dict(w=4, d=24, M=17, bias=False, H=9, W=7),
    dict(w=6, d=16, M=None, bias=True, H=7, W=8, h=1),
    dict(w=7, d=32, M=9, bias=True, H=9, W=15),
    dict(w=7, d=16, M=2, bias=True, H=3, W=2),
    dict(w=7, d=16, M=1, bias=True, H=7, W=9, h=1),  # one window along an axis
    dict(w=8, d=16, M=None, bias=False, H=9, W=8),
    dict(w=12, d=16, M=3, bias=True, H=13, W=5, h=1),
    dict(w=16, d=16, M=70, bias=False, H=17, W=4, h=1),
]


# rectangular windows, of one row and of one column, with margins of no, half and several windows
RECTANGLES = [
    dict(w=(1, 8), d=16, M=4, bias=True, H=1, W=37, B=1),
    dict(w=(4, 16), d=16, M=3, bias=True, H=5, W=20, B=1, h=1),
    dict(w=(2, 3), d=8, M=1, bias=True, H=5, W=8, B=1, h=1),
    dict(w=(2, 3, 0, 4), d=16, M=2, bias=True, H=9, W=7, B=1, h=1),
    dict(w=(2, 3, 5, 1), d=20, M=0, bias=False, H=9, W=7, B=1, h=1),
    dict(w=(8, 1), d=16, M=5, bias=True, H=10, W=5, B=1, h=1),
    # one window per tile, and margins wider than two of them
    dict(w=(6, 5, 0, 11), d=16, M=None, bias=True, H=7, W=17, B=1, h=1),
]
MORE_RECTANGLES = [
    dict(w=(1, 8), d=16, M=None, bias=False, H=1, W=70, h=1),
    dict(w=(5, 2, 2, 0), d=16, M=None, bias=False, H=9, W=9, h=1),
    dict(w=(3, 20, 4, 0), d=16, M=2, bias=True, H=10, W=25, h=1),
    dict(w=(1, 1, 9, 17), d=16, M=None, bias=True, H=11, W=19, h=1),
    dict(w=(6, 5, 13, 6), d=16, M=1, bias=True, H=31, W=17, h=1),
]


@pytest.mark.parametrize('case', [*CASES, *RECTANGLES], ids=str)
def test_matches_reference(interpreter, case):
    check(interpreter('measure', **case))


# some tokens, and all of one image: queries without any key where there are no additional ones
PADDED = [
    dict(w=2, d=16, M=3, bias=True, H=5, W=7, h=1, padding=.4),
    dict(w=2, d=16, M=None, bias=False, H=4, W=9, h=1, padding='image'),
    dict(w=7, d=16, M=None, bias=True, H=8, W=6, h=1, padding='image', dtype='bfloat16'),
    dict(w=(1, 8), d=16, M=2, bias=True, H=1, W=21, h=1, padding='image'),
    dict(w=(6, 5, 0, 6), d=16, M=None, bias=False, H=7, W=8, B=1, h=1, padding=.7),
]


@pytest.mark.parametrize('case', PADDED, ids=str)
def test_padding(interpreter, case):
    check(interpreter('measure', **case), case.get('dtype', 'float32'))


@pytest.mark.parametrize('M', [None, 2])
def test_padding_of_the_operator(interpreter, M):
    for finite, error in interpreter('padded', M=M):
        assert finite and error <= 2e-6


def test_padding_without_a_mask_is_the_same(interpreter):
    case = dict(w=2, d=16, M=2, bias=True, H=4, W=5, B=1, h=1)
    assert interpreter('measure', **case, padding=0.) == interpreter('measure', **case)


@pytest.mark.slow
@pytest.mark.parametrize('case', MORE_RECTANGLES, ids=str)
def test_more_rectangles_match_reference(interpreter, case):
    check(interpreter('measure', **case))


@pytest.mark.parametrize('case', [
    dict(w=3, d=16, M=18, bias=False, H=5, W=7, h=1),
    dict(w=7, d=16, M=3, bias=True, H=8, W=6, h=1),
], ids=str)
def test_small_blocks(interpreter, case):
    """Several blocks of everything, and sums of several steps."""
    check(interpreter('measure', blocks=(32, 16, 4, 1), **case))


@pytest.mark.slow
@pytest.mark.parametrize('blocks', [(64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)], ids=str)
@pytest.mark.parametrize('case', [*CASES, *RECTANGLES, *MORE_RECTANGLES, *PADDED], ids=str)
def test_launched_blocks(interpreter, case, blocks):
    check(interpreter('measure', blocks=blocks, **case), case.get('dtype', 'float32'))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('case', [
    dict(w=7, d=32, M=9, bias=True, H=9, W=7, B=1),
    dict(w=2, d=80, M=4, bias=False, H=9, W=7, B=1),
    dict(w=(1, 8), d=16, M=4, bias=True, H=1, W=37, B=1, h=1),
], ids=str)
def test_half_precision(interpreter, case, dtype):
    check(interpreter('measure', **case, dtype=dtype), dtype)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('size', [1e2, 1e3])  # logits of 1e4 and 1e6
def test_large_values(interpreter, size, dtype):
    errors = interpreter(
        'measure', w=7, d=32, M=2, bias=True, H=8, W=3, B=1, h=1, dtype=dtype, size=size, grad_size=1e-2)
    assert errors['finite'], errors


if torch.cuda.is_available():
    @pytest.mark.parametrize('dtype', TOLERANCE)
    @pytest.mark.parametrize('case', [
        *CASES, *RECTANGLES, *MORE_RECTANGLES, *PADDED,
        dict(w=7, d=32, M=9, bias=True, H=56, W=56, B=4, h=3),
        dict(w=8, d=64, M=65, bias=True, H=40, W=50, h=4),
        dict(w=2, d=80, M=4, bias=False, H=64, W=63, h=16),
        dict(w=4, d=128, M=16, bias=False, H=28, W=28, h=2),
    ], ids=str)
    def test_on_gpu(case, dtype):
        check(measure(**{**case, 'dtype': dtype}, device='cuda'), dtype)


@pytest.mark.parametrize('case', [
    dict(d=16, r=1, kinds=1, N=50, B=1, h=1),
    dict(d=20, r=8, kinds=2, N=600),  # two chunks
    dict(d=32, r=17, kinds=2, N=300, B=1, dtype='bfloat16'),
    dict(d=32, r=3, kinds=1, N=1100, B=1, dtype='float16'),
], ids=str)
def test_sums_over_all_tokens(interpreter, case):
    tolerance = TOLERANCE[case.get('dtype', 'float32')][1]
    for name, errors in interpreter('measure_sums', **case).items():
        assert max(errors) <= tolerance, (name, errors)


def test_operators_of_sums(interpreter):
    assert interpreter('contracts') == [True, True]


def test_model_trains_by_kernels(interpreter):
    eager, compiled = interpreter('whole_model')
    assert eager < 1e-4 and compiled < 1e-4, (eager, compiled)


def compile_cases():
    """Kernel, architecture, dtype, head width, window size, number of additional keys, has a bias?"""
    for arch, kernel in itertools.product((80, 90), KERNELS):
        yield kernel, arch, 'bfloat16', 32, 7, 9, True
        if kernel != 'bias_gradient':
            yield kernel, arch, 'bfloat16', 128, 2, 4, False


def all_compile_cases():
    """What there is to choose from, but for cases that make no difference to a kernel or are easier than others."""
    yield from itertools.product(KERNELS, (80, 90), ('float16',), (64,), (7,), (9,), (True,))
    problems = [(2, False), (8, False), (2, True), (7, True), (8, True), (12, True), (16, True)]
    widths = 16, 32, 48, 64, 80, 96, 128
    for kernel, arch, dtype, d in itertools.product(KERNELS, (80, 90), ('bfloat16', 'float32'), widths):
        for w, bias in problems[-1:] if kernel == 'additional_gradient' else problems:
            if bias or kernel != 'bias_gradient':
                yield kernel, arch, dtype, d, w, 65, bias


def rectangular_compile_cases():
    """The window of a sequence, a wide one with a tile of its own, and margins wider than a window."""
    for kernel, (w, bias) in itertools.product(
            ('forward', 'query_gradient', 'key_gradient', 'bias_gradient'),
            (((1, 8), True), ((1, 8), False), ((4, 16), True), ((2, 3, 5, 4), True))):
        if bias or kernel != 'bias_gradient':
            yield kernel, 90, 'bfloat16', 64, w, 9, bias


def padded_compile_cases():
    """A mask adds a load and registers to each kernel that reads it."""
    kernels = 'forward', 'query_gradient', 'key_gradient', 'bias_gradient'
    for kernel, arch, d in itertools.product(kernels, (80, 90), (32, 64)):
        yield kernel, arch, 'bfloat16', d, 7, True
        if kernel != 'bias_gradient':
            yield kernel, arch, 'bfloat16', d, 2, False


def check_compiled(answers, arch):
    for answer in answers:
        assert answer['spilled'] == 0, answer
        assert answer['shared'] <= SHARED_MEMORY[arch], answer


@pytest.mark.parametrize('kernel,arch,dtype,d,w,M,bias', list(compile_cases()))
def test_compiles_without_spills(compiler, kernel, arch, dtype, d, w, M, bias):
    check_compiled(compiler('spills', kernel=kernel, arch=arch, dtype=dtype, head_dim=d, window_size=w,
                            num_additional=M, has_bias=bias), arch)


@pytest.mark.parametrize('kernel', SUM_KERNELS)
@pytest.mark.parametrize('arch,dtype,d,rows', [(80, 'bfloat16', 64, 9), (90, 'bfloat16', 32, 9)])
def test_sums_compile_without_spills(compiler, kernel, arch, dtype, d, rows):
    check_compiled(compiler('spills', kernel=kernel, arch=arch, dtype=dtype, head_dim=d, num_additional=rows), arch)


@pytest.mark.slow
@pytest.mark.parametrize('kernel', SUM_KERNELS)
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('dtype,d,rows', [
    *itertools.product(('bfloat16',), (16, 32, 48, 64, 80, 96, 128), (16, 32)), ('float16', 64, 9),
    *itertools.product(('float32',), (16, 32, 48, 64, 80, 96, 128), (16,))])
def test_all_sums_compile_without_spills(compiler, kernel, arch, dtype, d, rows):
    test_sums_compile_without_spills(compiler, kernel, arch, dtype, d, rows)


@pytest.mark.slow
@pytest.mark.parametrize('kernel,arch,dtype,d,w,M,bias', [*all_compile_cases(), *rectangular_compile_cases()])
def test_all_compile_without_spills(compiler, kernel, arch, dtype, d, w, M, bias):
    test_compiles_without_spills(compiler, kernel, arch, dtype, d, w, M, bias)


@pytest.mark.slow
@pytest.mark.parametrize('kernel,arch,dtype,d,w,bias', list(padded_compile_cases()))
def test_compiles_with_padding(compiler, kernel, arch, dtype, d, w, bias):
    """A block shape of the forward kernel for compute capability 8.0 spills 16 bytes with a mask, for d = 64."""
    for answer in compiler('spills', kernel=kernel, arch=arch, dtype=dtype, head_dim=d, window_size=w,
                           num_additional=9, has_bias=bias, has_padding=True):
        assert answer['spilled'] <= 16, answer
        assert answer['shared'] <= SHARED_MEMORY[arch], answer


@pytest.mark.parametrize('case', [
    dict(w=8, d=32, M=9, bias=True, H=15, W=15, dtype='bfloat16', padding=.5),
    # sizes of one are constants to the compiler
    dict(w=2, d=16, M=1, bias=True, H=1, W=1, B=1, h=1, dtype='float16'),
], ids=str)
def test_launch_arguments(compiler, case):
    """What a launch passes compiles, and is one version of each kernel."""
    assert compiler('launch', **case) == [1] * len(KERNELS)


def test_one_version_for_all_sizes(compiler):
    """Sizes of 1, odd ones and multiples of 16 are one compiled kernel each; sums of parts are one more."""
    case = dict(w=7, d=16, M=10, bias=True, h=3, dtype='bfloat16')
    sizes = ((2, 15, 15), (1, 16, 32), (1, 1, 7), (16, 48, 33))
    versions = [compiler('launch', **case, B=B, H=H, W=W) for B, H, W in sizes]
    assert versions[0] == [1] * len(KERNELS)
    in_parts = [int(kernel == 'additional_gradient') for kernel in KERNELS]
    assert versions[1:] == [in_parts, [0] * len(KERNELS), [0] * len(KERNELS)]


def test_nan_reaches_all_gradients(interpreter):
    assert interpreter('nan_spreads') == [True, True]


def test_gradients_of_large_logits(interpreter):
    # on a GPU less: the interpreter rounds twice in a fused multiply-add. With one log-sum-exp it is 1.1e-3 there
    assert interpreter('large_peaks') <= 5e-4


def test_gradients_that_nobody_needs_are_not_computed(interpreter):
    first = 'query_gradient'  # makes what the others need
    assert interpreter('unneeded') == {
        'query': [[first], ['query']], 'pair': [[first, 'key_gradient'], ['pair']],
        'additional': [[first, 'additional_gradient'], ['additional']], 'bias': [[first, 'bias_gradient'], ['bias']]}


def test_precision_of_products(interpreter):
    assert interpreter('tf32') == ['ieee', 'tf32', 'ieee', 'tf32']


@pytest.mark.parametrize('how,reason', [
    ('compile', 'they raise RuntimeError: Failed to find C compiler'),
    ('exception', 'they raise OSError: libcuda.so cannot be found'),
    ('import', None),
    ('wrong', 'gradient of keys and values differs'),
])
def test_trains_with_broken_kernels(tmp_path, how, reason):
    """Each kind of problem is tried once, warned of once and computed by `blocked`."""
    program = Program(tmp_path, TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    answer = program('broken', how=how)
    program.close()
    assert answer['losses'][2] < answer['losses'][0]
    if reason is None:  # a reason not to use them at all, as where there is no Triton
        assert answer['warnings'] == []
    else:
        assert answer['warnings'] and len(set(answer['warnings'])) == len(answer['warnings'])
        assert all(reason in w and 'ls-vision doctor' in w for w in answer['warnings'])


@pytest.mark.slow
def test_tuned_launches(compiler):
    """All block shapes are tried in the first call, and none is compiled in the second."""
    case = dict(w=7, d=64, M=9, bias=True, H=15, W=15, dtype='float16', tune=True)
    shapes = [launcher.block_shapes(kernel, 64, torch.float16, (9, 0)) for kernel in KERNELS]
    assert compiler('launch', **case) == [len(shape) for shape in shapes]
    assert compiler('launch', **case) == [0] * len(KERNELS)


def test_strided_inputs_are_not_copied():
    (query, pair, _, additional, bias, scale), _ = draw(w=7, d=16, M=3, bias=True, H=8, W=8)
    arguments = launcher._arguments(query, pair, make_window(7), additional, bias, scale, None)
    assert not pair.is_contiguous()
    key, value, more = pair[:, :, :, 0], pair[:, :, :, 1], additional.unbind(2)
    for name, x in (('q', query), ('k', key), ('v', value), ('ak', more[0]), ('av', more[1])):
        assert arguments[f'{name}_ptr'].data_ptr() == x.data_ptr()


def test_refuses_rows_beyond_32_bit_offsets():
    wide = torch.empty_strided((1, 2, 2 ** 20, 4, 16), (2 ** 27, 2 ** 26, 64, 16, 1), device='meta')
    pair = torch.empty((), device='meta').expand(1, 2, 2 ** 20, 2, 4, 16)
    with pytest.raises(ValueError, match=r'2\^31'):
        launcher._arguments(wide, pair, make_window(2), None, None, 1., None)


def largest(cols, rows):
    """The largest window of so many columns and a multiple of `rows` that the kernels take."""
    sizes = range(rows, 2 ** 20, rows)
    return next(Window(n, cols, rows, cols) for n in sizes if launcher._no_window(Window(n + rows, cols, rows, cols)))


@pytest.mark.parametrize('window', [make_window(50), largest(1, 1), largest(8, 16), largest(150, 1)], ids=str)
def test_division_is_exact_up_to_the_largest_window(window):
    """Token numbers are divided by multiplication and shift, in 32 bits."""
    assert launcher._no_window(window) is None
    for rows, cols in (launcher._keys_around_tile(window), launcher._queries_around_tile(window)):
        index = torch.arange(rows * cols + launcher._LARGEST_BLOCK)
        product = index * (2 ** 20 // cols + 1)
        assert torch.equal(product >> 20, index // cols) and int(product.max()) < 2 ** 31


@pytest.mark.parametrize('window,tile', [
    (1, (8, 8)), (2, (8, 8)), (3, (6, 6)), (4, (8, 8)), (5, (5, 5)), (7, (7, 7)), (16, (16, 16)),
    ((1, 8), (1, 64)), ((1, 24), (1, 48)), ((1, 100), (1, 100)), ((8, 1), (8, 8)), ((4, 16), (4, 16)),
    ((16, 4), (16, 4)), ((2, 16), (4, 16)), ((2, 3), (8, 6)), ((100, 1), (100, 1)),
], ids=str)
def test_tiles_are_whole_windows(window, tile):
    assert launcher.tile_size(make_window(window)) == tile


@pytest.mark.parametrize('shape,window,reason', [
    ((1, 4, 4, 1, 16), 51, r'101 x 101 of them are too many, for \(51, 51, 25, 25\)'),
    ((1, 4, 4, 1, 16), (1, 512), r'3 x 1024 of them are too many'),
    ((1, 4, 4, 1, 160), 7, 'head widths of up to 128, not 160'),
    ((1, 2, 2 ** 20, 4, 16), 2, r'less than 2\^31'),
])
def test_names_the_size_that_it_does_not_take(shape, window, reason):
    query = torch.empty((), device='meta').expand(shape)
    assert re.search(reason, launcher._no_size(query, make_window(window)))


def test_partial_sums_do_not_depend_on_the_tuned_shape():
    """Their buffers are allocated before the shape is chosen."""
    for kernel in ('additional_gradient', 'bias_gradient'):
        for dtype, capability, d in itertools.product((torch.float32, torch.bfloat16), ((8, 0), (9, 0)), (32, 128)):
            shapes = launcher.block_shapes(kernel, d, dtype, capability)
            assert len({(shape.queries, shape.keys) for shape in shapes}) == 1


if __name__ == '__main__':
    main()
