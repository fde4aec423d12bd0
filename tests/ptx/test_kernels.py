"""Our kernels, compiled for compute capability 8.0 as launches compile them, in the interpreter of PTX.

Tensors are just as large as they must be, so that a token too many is outside of them, and what the launches allocate
is NaN at first. B batch, H x W grid, h heads, d head width, M additional keys, w window size.
"""
import contextlib
import re
from unittest import mock

import pytest
import torch

from ls_vision.ops.attention import long_short_attention
from ls_vision.ops.backends import BACKENDS
from ls_vision.ops.backends.triton import launch as launcher
from ls_vision.ops.window import Window, make_window, num_keys, num_queries

pytest.importorskip('triton')

from ls_vision.ops.backends.triton import kernels, long_range, long_range_kernels
from ptx.launches import interpreted
from ptx.memory import DataRace, EarlyAccess, Fault, Misaligned, OutOfBounds, UnwrittenRead

WINDOW_KERNELS = [name for name in vars(kernels) if name.endswith('_kernel')]
SUM_KERNELS = [name for name in vars(long_range_kernels) if name.endswith('_kernel')]
# largest error as a fraction of the largest entry
TOLERANCE = {'float32': 4e-6, 'float16': 2e-3, 'bfloat16': 1.5e-2}

# a grid that tiles don't divide, one and several windows per tile; the first has a tile with no key beyond the edges
CASE = dict(w=7, d=32, M=9, bias=True, H=19, W=17, h=1, dtype='bfloat16')
# N tokens of n kinds in two chunks, r summaries or global queries
SUM_CASE = dict(d=32, r=3, kinds=2, N=70, dtype='bfloat16')
CASES = [CASE, dict(w=2, d=16, M=3, bias=True, H=9, W=5, h=1, dtype='float32')]


def draw(w, d, M, bias, H, W, B=1, h=2, dtype='float32', padding=0.):
    """Arguments of `long_short_attention`, a mask of so many of the tokens the last, and its output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    dtype, window = getattr(torch, dtype), make_window(w)
    query, key, value, grad = (randn(B, H, W, h, d).to(dtype) for _ in range(4))
    additional = [None, None] if M is None else [randn(B, M, h, d).to(dtype) for _ in range(2)]
    bias = randn(h, num_queries(window), num_keys(window)) if bias else None
    mask = torch.rand(B, H, W, generator=generator) < padding if padding else None
    return (query, key, value, window, *additional, bias, mask), grad


def attend(arguments, grad, backend):
    """Output, log-sum-exp and the gradients of all tensors."""
    *arguments, mask = arguments
    arguments = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = long_short_attention(*arguments, backend=backend, return_lse=True, key_padding_mask=mask)
    if mask is not None:  # of no meaning there
        lse = lse.masked_fill(mask.unsqueeze(1), 0.)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, tensors, grad))]


@contextlib.contextmanager
def undefined_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(arguments, grad, shape=0):
    """Output, log-sum-exp and gradients by the kernels, and their launches.

    Args:
        arguments, grad: From `draw`.
        shape: Which of each kernel's block shapes, the last if there are fewer.
    """
    shapes = launcher.block_shapes

    def one_for_ampere(*kernel):
        choice = shapes(*kernel[:-1], (8, 0))
        return choice[min(shape, len(choice) - 1):]

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(launcher, 'block_shapes', one_for_ampere))
        enter(mock.patch.dict(BACKENDS, triton=BACKENDS['triton']._replace(why_not=lambda *_: None)))
        enter(undefined_memory_is_nan())
        launches = enter(interpreted())
        return attend(arguments, grad, 'triton'), launches


def draw_sums(d, r, kinds, N, dtype, h=2):
    """Scores, tokens, queries and own keys of one image, gradient of the sums."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, h, r, N), (1, N, kinds, h, d), (1, r, h, d), (1, r, 2, h, d), (1, r, kinds, h, d)
    return [torch.randn(*shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]


def sums_by_kernels(scores, tokens, query, own, grad):
    """Summaries and global attention with their gradients, and the launches."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        shapes = launcher.block_shapes
        enter(mock.patch.object(launcher, 'block_shapes', lambda *kernel: shapes(*kernel[:-1], (8, 0))[:1]))
        enter(mock.patch.multiple(long_range, _SMALLEST_CHUNK=32, _PROGRAMS=4))
        enter(undefined_memory_is_nan())
        launches = enter(interpreted())
        sums, statistics = long_range.summarize(scores, tokens)
        out, own_statistics = long_range.attend(query, own, tokens, .3)
        return [
            sums, *long_range.summarize_backward(grad, None, scores, tokens, sums, statistics),
            out, *long_range.attend_backward(grad[:, :, 0], None, query, own, tokens, .3, out, own_statistics),
        ], launches


def sums_by_formula(*inputs):
    """The same in float64."""
    scores, tokens, query, own = (x.double().requires_grad_() for x in inputs[:-1])
    grad = inputs[-1].double()
    sums = torch.einsum('bhrn,bnkhd->brkhd', scores.softmax(-1), tokens)
    k, v = (torch.cat([own[:, :, i], tokens[:, :, i]], 1) for i in (0, -1))
    weights = (torch.einsum('bghd,bnhd->bhgn', query, k) * .3).softmax(-1)
    out = torch.einsum('bhgn,bnhd->bghd', weights, v)
    return [
        sums, *torch.autograd.grad(sums, (scores, tokens), grad),
        out, *torch.autograd.grad(out, (query, own, tokens), grad[:, :, 0])]


def check_sums(case):
    """Compares with float64 -> the launches."""
    inputs = draw_sums(**case)
    results, launches = sums_by_kernels(*inputs)
    errors = [
        float((result.double() - exact).abs().max() / exact.abs().max())
        for result, exact in zip(results, [x.detach() for x in sums_by_formula(*inputs)], strict=True)]
    assert max(errors) <= TOLERANCE[case['dtype']], errors
    return launches


def check(case, tolerance=None, shape=0):
    """Compares with the reference in float64 -> the launches."""
    arguments, grad = draw(**case)
    results, launches = run(arguments, grad, shape)
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    errors = [
        float((result.double() - exact).abs().max() / exact.abs().max())
        for result, exact in zip(results, attend(double, grad.double(), 'reference'), strict=True)
        if exact.numel()
    ]
    tolerance = tolerance or TOLERANCE[case['dtype']]
    assert all(error <= tolerance for error in errors), errors
    return launches


@pytest.fixture(scope='module', autouse=True)
def compiled_afresh(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_CACHE_DIR', str(tmp_path_factory.mktemp('triton')))
        yield


@pytest.fixture(scope='module')
def launches(compiled_afresh):
    """By kernel, those of a case that passes."""
    return {launch.name: launch for launch in check(CASE)}


@pytest.mark.parametrize('case', CASES, ids=str)
def test_matches_float64(case):
    assert {launch.name for launch in check(case)} == set(WINDOW_KERNELS)


@pytest.mark.parametrize('case', [SUM_CASE, dict(d=16, r=1, kinds=1, N=65, h=1, dtype='float32')], ids=str)
def test_sums_match_float64(case):
    assert {launch.name for launch in check_sums(case)} == set(SUM_KERNELS)


def faults_of_each(launch, statement):
    """What is found if one such statement is missing, for each of them."""
    found = []
    for match in re.finditer(rf'{statement}[^;]*;', launch.ptx):
        try:
            launch.run(launch.ptx[:match.start()] + launch.ptx[match.end():])
            found.append(None)
        except Fault as fault:
            found.append(type(fault))
    return found


@pytest.mark.parametrize('kernel', WINDOW_KERNELS)
def test_finds_missing_barrier(launches, kernel):
    found = faults_of_each(launches[kernel], r'bar\.sync')
    # compilers may set one that is not needed
    assert found.count(DataRace) > 0.8 * len(found), found


@pytest.mark.parametrize('kernel', WINDOW_KERNELS)
def test_finds_missing_wait(launches, kernel):
    found = faults_of_each(launches[kernel], r'cp\.async\.wait_group')
    # compilers set one at the end, after which there may be nothing to wait for
    assert EarlyAccess in found and set(found[:-1]) <= {EarlyAccess} and found[-1] in (EarlyAccess, None), found


@pytest.mark.parametrize('kernel', WINDOW_KERNELS)
@pytest.mark.parametrize('kind,statement,edit', [
    (OutOfBounds, r'ld\.global|cp\.async\.c[ag]', (r'(\[ %rd\d+ \+) 0', r'\1 16')),  # the next eight numbers of 16 bits
    (OutOfBounds, r'st\.global', (r'(\[ %rd\d+ \+) 0', r'\1 16')),
    (OutOfBounds, r'setp\.lt', (r'\.lt', '.le')),  # one row, column or key too many
    (Misaligned, r'st\.global', (r'(\[ %rd\d+ \+) 0', r'\1 2')),
    (UnwrittenRead, r'(?:@!?%p\d+\s+)?(?:st\.shared|cp\.async\.c[ag])', (r'(?s).+', '')),
], ids=['load', 'store', 'edge', 'misaligned', 'nothing written'])
def test_finds_wrong_access(launches, kernel, kind, statement, edit):
    ptx = launches[kernel].ptx
    edited = re.sub(rf'(?:{statement})[^;]*;', lambda match: re.sub(*edit, match[0]), ptx)
    assert edited != ptx
    with pytest.raises(kind):
        launches[kernel].run(edited)


@pytest.mark.slow
@pytest.mark.parametrize('dtype,shape', [('float32', 0), ('float16', 0), ('bfloat16', 0), ('bfloat16', 1)])
@pytest.mark.parametrize('case', [
    dict(w=1, d=16, M=1, bias=True, H=9, W=5),
    dict(w=2, d=20, M=4, bias=False, H=17, W=11, B=2),
    dict(w=3, d=8, M=0, bias=True, H=7, W=8),
    dict(w=4, d=128, M=33, bias=False, H=9, W=7),
    dict(w=6, d=64, M=None, bias=True, H=7, W=20),
    dict(w=7, d=32, M=9, bias=True, H=15, W=8, B=2),
    dict(w=7, d=32, M=2, bias=True, H=3, W=2),
    dict(w=8, d=64, M=65, bias=True, H=30, W=31),
    dict(w=12, d=16, M=3, bias=True, H=13, W=5, h=1),
    dict(w=16, d=16, M=70, bias=False, H=17, W=4, h=1),
], ids=str)
def test_more_match_float64(case, dtype, shape):
    check(dict(case, dtype=dtype), shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize('case', [
    dict(w=(1, 8), d=32, M=4, bias=True, H=1, W=140, dtype='bfloat16'),
    dict(w=Window(2, 3, 5, 4), d=16, M=None, bias=False, H=11, W=13, dtype='float32'),
    dict(w=Window(6, 5, 0, 11), d=16, M=None, bias=True, H=13, W=17, dtype='bfloat16'),
    dict(w=7, d=32, M=9, bias=True, H=19, W=17, h=1, dtype='bfloat16', padding=.4),
    # queries of some windows have no key
    dict(w=Window(2, 2, 0, 0), d=16, M=None, bias=False, H=9, W=5, B=2, dtype='float32', padding=.7),
], ids=str)
def test_rectangles_and_padding_match_float64(case):
    check(case)


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=str)
def test_tf32_matches_float64(tf32, case):
    check(dict(case, dtype='float32'), tolerance=5e-3)
