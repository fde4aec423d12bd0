"""Summaries and global tokens against their formulas, over all tokens at once and merged from parts."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ls_vision.ops import joint_heads, long_range
from ls_vision.ops.long_range import SHORTEST_IN_PLACE, attend_globally, merge_parts, summarize


def draw(g=2, m=3, N=20, kinds=2, dtype=torch.float64, size=1.):
    torch.manual_seed(0)
    shapes = (2, g, 3, 8), (2, m, 2, 3, 8), (2, N, kinds, 3, 8)
    return [(size * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def formula(query, own, tokens, scale):
    k, v = torch.cat([own[:, :, 0], tokens[:, :, 0]], 1), torch.cat([own[:, :, 1], tokens[:, :, -1]], 1)
    logits = scale * torch.einsum('bghd,bnhd->bhgn', query, k)
    return torch.einsum('bhgn,bnhd->bghd', logits.softmax(-1), v), logits.logsumexp(-1)


@pytest.mark.parametrize('kinds', [1, 2])
@pytest.mark.parametrize('g,m,N', [(1, 1, 20), (3, 2, 7), (1, 1, 0)])
def test_global_attention_matches_formula(g, m, N, kinds):
    leaves = draw(g, m, N, kinds)
    actual, expected = attend_globally(*leaves, 0.4, with_lse=True), formula(*leaves, 0.4)
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(x) for x in actual]
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grads), torch.autograd.grad(expected, leaves, grads))
    out, lse = attend_globally(*leaves, 0.4)
    assert lse.numel() == 0
    torch.testing.assert_close(out, expected[0])


@pytest.mark.parametrize('with_lse', [False, True])
@pytest.mark.parametrize('kinds', [1, 2])
def test_global_attention_contract(kinds, with_lse):
    args = draw(dtype=torch.float32, kinds=kinds)
    torch.library.opcheck(torch.ops.ls_vision.global_attention.default, (*args, 0.4, with_lse))


def by_token(scores):
    """(B, h, r, N) in the memory order of (B, N, h, r), as a linear map of the tokens makes them."""
    return scores.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.mark.parametrize('N', [20, SHORTEST_IN_PLACE])
@pytest.mark.parametrize('lay_out', [lambda x: x, by_token], ids=['by_rank', 'by_token'])
def test_summaries_contract(lay_out, N):
    weights = lay_out(torch.rand(2, 3, 5, N)).requires_grad_()
    tokens = torch.randn(2, N + 2, 2, 3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.ls_vision.summarize.default, (weights, tokens[:, 2:]))
    grad = torch.ops.ls_vision.summarize_backward(torch.ones(2, 2, 3, 5, 8), weights, tokens[:, 2:])[0]
    assert grad.stride() == weights.stride()  # what the compiler is told


@pytest.mark.parametrize('N', [20, SHORTEST_IN_PLACE, SHORTEST_IN_PLACE + 30])
@pytest.mark.parametrize('lay_out', [lambda x: x, by_token], ids=['by_rank', 'by_token'])
def test_summaries_match_formula(lay_out, N, monkeypatch):
    monkeypatch.setattr(long_range, 'CHUNK_ELEMENTS', 1)  # as few tokens at a time as possible
    scores = lay_out(torch.randn(2, 3, 5, N, dtype=torch.float64)).requires_grad_()
    tokens = torch.randn(2, N, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    actual, lse = summarize(scores, tokens, with_lse=True)
    expected = torch.einsum('bhrn,bnkhd->bhrkd', scores.softmax(-1), tokens)
    torch.testing.assert_close((actual, lse), (expected, scores.logsumexp(-1)))
    grad = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (scores, tokens), grad), torch.autograd.grad(expected, (scores, tokens), grad))


def flat_summaries(scores, tokens):
    """(B, h, r, n * d) and their log-sum-exp."""
    sums, lse = summarize(scores, tokens, with_lse=True)
    return sums.flatten(3), lse


@pytest.mark.parametrize('cuts', [[20], [7, 13], [1, 12, 7]])
def test_parts_merge(cuts):
    """Softmax over all tokens from parts of them, as devices with a part of an image each have them."""
    scores, tokens = torch.randn(2, 3, 5, 20, dtype=torch.float64), torch.randn(2, 20, 2, 3, 8, dtype=torch.float64)
    parts = [flat_summaries(s, t) for s, t in zip(scores.split(cuts, -1), tokens.split(cuts, 1), strict=True)]
    torch.testing.assert_close(merge_parts(parts), flat_summaries(scores, tokens))

    query, own, tokens = draw()
    expected, lse = attend_globally(query, own, tokens, 0.4, with_lse=True)
    nothing = own[:, :0]
    parts = [attend_globally(query, nothing, t, 0.4, with_lse=True) for t in (own, *tokens.split(cuts, 1))]
    merged, merged_lse = merge_parts([(out.transpose(1, 2), part_lse) for out, part_lse in parts])  # (B, h, g, d)
    torch.testing.assert_close((merged.transpose(1, 2), merged_lse), (expected, lse))


@pytest.mark.parametrize('dtype,tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    args = draw(dtype=dtype)
    out, _ = attend_globally(*args, 0.4)
    assert out.dtype == dtype
    expected, _ = formula(*(t.double() for t in args), 0.4)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    args = draw(dtype=dtype, size=1e3)
    out, _ = attend_globally(*args, 1.)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, args, 1e-3 * torch.randn_like(out)))


def test_nothing_but_arguments_is_kept():
    args = draw(N=500, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend_globally(*args, 0.4)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in args}


@pytest.mark.parametrize('kinds', [1, 2])
@pytest.mark.parametrize('g,m,N', [(1, 1, 20), (3, 2, 7), (1, 1, 0)])
def test_joint_heads_are_the_same_attention(g, m, N, kinds):
    """What GPUs compute; its tensors may be on any device."""
    leaves = draw(g, m, N, kinds)
    actual, expected = joint_heads.attend(*leaves, 0.4, True), formula(*leaves, 0.4)
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(x) for x in actual]
    with torch.no_grad():
        actual = joint_heads.attend_backward(*grads, *leaves, 0.4)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grads))


def test_joint_heads_are_the_same_summaries():
    weights = torch.rand(2, 3, 5, 20, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 22, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    some = tokens[:, 2:]
    expected = torch.einsum('bhrn,bnkhd->bkhrd', weights, some)
    grad = torch.randn_like(expected)
    with torch.no_grad():
        torch.testing.assert_close(joint_heads.summarize(weights, some), expected)
        actual = joint_heads.summarize_backward(grad, weights, some)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (weights, some), grad))


class CopiedBytes(TorchDispatchMode):
    """Bytes that operations write which only copy, of tensors of at least `size` elements."""
    COPIES = ('aten::clone', 'aten::copy_', 'aten::_to_copy', 'aten::contiguous')

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name().split('.')[0] in self.COPIES and out.numel() >= self.size:
            self.bytes += out.nbytes
        return out


def test_joint_heads_copy_no_tokens():
    (query, own, tokens), N = [x.detach() for x in draw(N=400, dtype=torch.float32)], 400
    tokens = torch.cat([tokens[:, :3], tokens], 1)[:, 3:]  # as layers pass them, a slice
    weights = torch.rand(2, 3, 5, N)
    with CopiedBytes(N * 8) as copied:
        out, lse = joint_heads.attend(query, own, tokens, 0.4, True)
        joint_heads.attend_backward(out, lse, query, own, tokens, 0.4)
        sums = joint_heads.summarize(weights, tokens)
        joint_heads.summarize_backward(sums, weights, tokens)
    assert copied.bytes == 0


def test_float16_weights_of_a_million_tokens():
    """Each weight is 1e-6, which float16 has no digits for."""
    N = 2 ** 20
    scores = torch.zeros(1, 1, 1, N, dtype=torch.float16)
    tokens = torch.ones(1, N, 1, 1, 2, dtype=torch.float16)
    sums, _ = summarize(scores + 1e-2 * torch.rand(N).half(), tokens)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=2e-3, atol=0)
    sums, _ = summarize(scores, 1e3 * tokens)
    assert sums.isfinite().all()
