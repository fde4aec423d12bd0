"""The operator behind the backends: contract with torch, choice, and chunks of any size."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import compare, draw_inputs
from torch.utils.flop_counter import FlopCounterMode

from ls_vision.ops import chunks, long_short_attention
from ls_vision.ops.backends import BACKENDS
from ls_vision.ops.window import make_window


@pytest.mark.parametrize('extra,bias', [(3, True), (0, False)])
@pytest.mark.parametrize('with_lse', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_operator_contract(extra, bias, with_lse, dtype):
    q, k, v, extra_k, extra_v, bias = draw_inputs(2, 9, 8, 2, 8, 4, extra, bias, dtype)
    pair = torch.stack([k, v], 3).detach().requires_grad_()
    additional = torch.stack([extra_k, extra_v], 2).detach().requires_grad_() if extra else None
    torch.library.opcheck(
        torch.ops.ls_vision.long_short_attention.default,
        (q, pair, additional, bias, make_window(4), 0.3, 'blocked', with_lse))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_that_the_operator_says(dtype):
    """opcheck does not compare what the backward operator returns with what it says."""
    q, k, v, extra_k, extra_v, bias = (t.detach() for t in draw_inputs(2, 9, 8, 2, 8, 4, 3, True, dtype))
    pair, additional, bias = torch.stack([k, v], 3), torch.stack([extra_k, extra_v], 2), bias.float()
    window = tuple(make_window(4))
    out, lse = torch.ops.ls_vision.long_short_attention(q, pair, additional, bias, window, 0.3, 'blocked', True)
    torch.library.opcheck(
        torch.ops.ls_vision.long_short_attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), q, pair, additional, bias, window, 0.3, 'blocked', out, lse,
         [True] * 4))


@settings(max_examples=40, deadline=None)
@given(
    elements=st.sampled_from([1, 300, 2000, 10 ** 6]), B=st.integers(1, 3), H=st.integers(1, 20), W=st.integers(1, 20),
    w=st.sampled_from([1, 2, 3, 4, 7]), M=st.integers(0, 3), bias=st.booleans())
def test_chunks_of_any_size(elements, B, H, W, w, M, bias):
    before, chunks.CHUNK_ELEMENTS = chunks.CHUNK_ELEMENTS, elements
    try:
        compare(draw_inputs(B, H, W, 2, 4, w, M, bias), w, 1e-5, backend='blocked')
    finally:
        chunks.CHUNK_ELEMENTS = before


@pytest.mark.parametrize('backend', ['reference', 'composite', 'blocked'])
def test_choice_by_argument_and_environment(backend, monkeypatch):
    """The forward function of the chosen backend is the one that runs."""
    inputs = draw_inputs(1, 9, 8, 2, 8, 4, 2, True)
    called = []

    def forward(*args):
        called.append(backend)
        return BACKENDS_BEFORE[backend].forward(*args)

    BACKENDS_BEFORE = dict(BACKENDS)
    monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(forward=forward))
    long_short_attention(*inputs[:3], 4, *inputs[3:], backend=backend)
    assert called == [backend]
    monkeypatch.setenv('LS_VISION_BACKEND', backend)
    out = long_short_attention(*inputs[:3], 4, *inputs[3:])
    assert called == [backend] * 2
    monkeypatch.setenv('LS_VISION_BACKEND', 'triton')  # the backward pass does not ask again
    out.sum().backward()


def test_wrong_choice(monkeypatch):
    q, k, v = draw_inputs(1, 4, 4, 2, 8, 2, 0, False)[:3]
    with pytest.raises(ValueError, match="backend is 'cudnn', expected one of reference, composite, blocked, flex"):
        long_short_attention(q, k, v, 2, backend='cudnn')
    with pytest.raises(ValueError, match=r"'triton', which can't run here: .*16 or 32 bits, .* has torch.float64"):
        long_short_attention(q.double(), k.double(), v.double(), 2, backend='triton')
    with pytest.raises(ValueError, match="'flex', which can't run here: FlexAttention has no backward pass on the CPU"):
        long_short_attention(q, k, v, 2, backend='flex')
    monkeypatch.setenv('LS_VISION_BACKEND', 'fast')
    with pytest.raises(ValueError, match="LS_VISION_BACKEND is 'fast'"):
        long_short_attention(q, k, v, 2)


def test_flops_are_those_of_whole_windows():
    """By PyTorch's counter, of the operator and of plain operations."""
    inputs = draw_inputs(2, 15, 12, 3, 16, 7, 9, True)
    windows = 2 * 3 * 2  # of two images, ragged below and to the right
    product = 2 * windows * 49 * (169 + 9) * 3 * 16
    for backend, backward in (('blocked', 5), ('composite', 4)):
        with FlopCounterMode(display=False) as counter:
            out = long_short_attention(*inputs[:3], 7, *inputs[3:], backend=backend)
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == 2 * product
        assert counter.get_total_flops() == (2 + backward) * product


def test_backward_keeps_no_tiles():
    """Saved for backward: what goes in and what comes out, each once."""
    inputs = [
        t if t is None else t.detach().clone().requires_grad_() for t in draw_inputs(1, 64, 64, 4, 8, 2, 4, False)]
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = long_short_attention(*inputs[:3], 2, *inputs[3:5])
    raster = 64 * 64 * 32 * 4
    assert out.grad_fn is not None
    assert sum(saved.values()) <= 4.1 * raster


@pytest.mark.parametrize('window', [2, 7, (2, 5)])
def test_compiles_once_for_all_sizes(window):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend='aot_eager')
    def compiled(q, k, v, extra_k, extra_v, bias):
        return long_short_attention(q, k, v, window, extra_k, extra_v, bias)

    for size in ((9, 8), (17, 11), (12, 13)):
        inputs = draw_inputs(2, *size, 2, 8, window, 3, True)
        out = compiled(*inputs)
        expected = long_short_attention(*inputs[:3], window, *inputs[3:])
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))
