"""The operator behind the backends: contract with torch, choice, and blocks of any size."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import compare, draw_inputs
from torch.utils.flop_counter import FlopCounterMode

from ls_vision.ops import chunks, long_short_attention


@pytest.mark.parametrize('extra,bias', [(3, True), (0, False)])
def test_operator_contract(extra, bias):
    inputs = draw_inputs(2, 9, 8, 2, 8, 4, extra, bias)
    torch.library.opcheck(
        torch.ops.ls_vision.long_short_attention.default, (*inputs[:3], 4, *inputs[3:], 0.3, 'blocked'))


@settings(max_examples=40, deadline=None)
@given(
    elements=st.sampled_from([1, 300, 2000, 10 ** 6]), B=st.integers(1, 3), H=st.integers(1, 20), W=st.integers(1, 20),
    w=st.sampled_from([1, 2, 3, 4, 7]), M=st.integers(0, 3), bias=st.booleans())
def test_blocks_of_any_size(elements, B, H, W, w, M, bias):
    before, chunks.CHUNK_ELEMENTS = chunks.CHUNK_ELEMENTS, elements
    try:
        compare(draw_inputs(B, H, W, 2, 4, w, M, bias), w, 1e-5, backend='blocked')
    finally:
        chunks.CHUNK_ELEMENTS = before


@pytest.mark.parametrize('backend', ['reference', 'blocked'])
def test_choice_by_argument_and_environment(backend, monkeypatch):
    inputs = draw_inputs(1, 9, 8, 2, 8, 4, 2, True)
    compare(inputs, 4, 1e-5, backend=backend)
    monkeypatch.setenv('LS_VISION_BACKEND', backend)
    compare(inputs, 4, 1e-5)


def test_wrong_choice(monkeypatch):
    q, k, v = draw_inputs(1, 4, 4, 2, 8, 2, 0, False)[:3]
    with pytest.raises(ValueError, match="backend is 'cudnn', expected one of reference, blocked, triton"):
        long_short_attention(q, k, v, 2, backend='cudnn')
    with pytest.raises(ValueError, match=r"backend 'triton' can't run on cpu tensors of torch.float64"):
        long_short_attention(q.double(), k.double(), v.double(), 2, backend='triton')
    monkeypatch.setenv('LS_VISION_BACKEND', 'fast')
    with pytest.raises(ValueError, match="LS_VISION_BACKEND is 'fast'"):
        long_short_attention(q, k, v, 2)


def test_flops_are_those_of_whole_windows():
    inputs = draw_inputs(2, 15, 12, 3, 16, 7, 9, True)
    q, k, v, extra_k, extra_v, bias = inputs
    with FlopCounterMode(display=False) as counter:
        out = long_short_attention(q, k, v, 7, extra_k, extra_v, bias)
        forward = counter.get_total_flops()
        out.sum().backward()
    windows = 2 * 3 * 2  # of two images, ragged below and to the right
    product = 2 * windows * 49 * (169 + 9) * 3 * 16
    assert forward == 2 * product
    assert counter.get_total_flops() == 7 * product


def test_backward_keeps_no_tiles():
    """Saved for backward: what goes in and what comes out, each once."""
    inputs = draw_inputs(1, 64, 64, 4, 8, 2, 4, False)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = long_short_attention(*inputs[:3], 2, *inputs[3:5])
    raster = 64 * 64 * 32 * 4
    assert out.grad_fn is not None
    assert sum(saved.values()) <= 4.1 * raster
