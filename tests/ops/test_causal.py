"""The causal operator against its dense form, and what PyTorch asks of an operator."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ls_vision.ops.causal import CausalGeometry, causal_attention, causal_pieces

pytestmark = pytest.mark.usefixtures('one_thread')
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest


def draw_inputs(geometry, B, M, L, h, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = geometry.num_visible(M)
    shapes = [
        (B, M, h, d), (B, L + M, 2, h, d), (B, S, 2, h, d), (geometry.window_size, h, d), (S, h, d), (h, d), (h, d)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(inputs, geometry, tolerance):
    actual = causal_attention(*inputs, geometry, 0.3)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = causal_attention(*exact, geometry, 0.3, backend='reference')
    weight = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(actual, inputs, weight.to(actual.dtype)), torch.autograd.grad(expected, exact, weight),
        strict=True)
    for a, e in ((actual, expected), *pairs):
        if e.numel():
            assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


@settings(max_examples=30, deadline=None)
@given(
    w=st.integers(1, 20), c=st.integers(1, 20), r=st.integers(0, 3), start=st.integers(0, 40), B=st.integers(1, 3),
    M=st.integers(1, 150), L=st.integers(0, 25), h=st.integers(1, 3), max_chunks=st.integers(0, 5),
    seed=st.integers(0, 99))
def test_matches_dense_form(w, c, r, start, B, M, L, h, max_chunks, seed):
    geometry = CausalGeometry(w, c, r, start, max_chunks)
    compare(draw_inputs(geometry, B, M, min(L, start), h, 4, seed=seed), geometry, TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_precisions(dtype):
    geometry = CausalGeometry(24, 8, 2, 13)
    compare(draw_inputs(geometry, 2, 150, 13, 2, 8, dtype), geometry, TOLERANCE[dtype])


@given(num_queries=st.integers(0, 400), start=st.integers(0, 200), c=st.integers(1, 100))
def test_pieces_cover_all_queries_and_begin_with_a_chunk(num_queries, start, c):
    position = 0
    for piece in causal_pieces(num_queries, CausalGeometry(1, c, 1, start)):
        assert piece.start == position and piece.size % piece.rows == 0
        assert piece.rows == c or (start + piece.start) // c == (start + piece.start + piece.size - 1) // c
        assert piece.rows != c or (start + piece.start) % c == 0
        position += piece.size
    assert position == num_queries


def test_opcheck():
    geometry = CausalGeometry(5, 3, 2, 4)
    torch.library.opcheck(torch.ops.ls_vision.causal_attention, (*draw_inputs(geometry, 2, 9, 4, 2, 4), geometry, 0.5))


def test_second_derivatives():
    geometry = CausalGeometry(2, 1, 1, 1)
    inputs = draw_inputs(geometry, 1, 2, 1, 1, 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *t: causal_attention(*t, geometry, 0.5), inputs)


def test_no_queries():
    geometry = CausalGeometry(5, 3, 2, 6)
    assert causal_attention(*draw_inputs(geometry, 2, 0, 4, 2, 4), geometry, 0.5).shape == (2, 0, 2, 4)
