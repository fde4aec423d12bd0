"""The global tokens' attention against the plain formula over all tokens in one tensor."""
import pytest
import torch
import torch.nn.functional as F

from ls_vision.ops.global_attention import attend_globally


def draw(g=2, m=3, N=20, same=False, dtype=torch.float64, size=1.):
    torch.manual_seed(0)
    query, own = size * torch.randn(2, g, 3, 8), size * torch.randn(2, m, 2, 3, 8)
    local = size * torch.randn(2, N, 2, 3, 8)  # strided, as in the layer
    query, own, local = (t.to(dtype).requires_grad_() for t in (query, own, local))
    keys, values = local.unbind(2)
    return (query, own, local), (query, *own.unbind(2), keys, keys if same else values)


def plain(query, own_keys, own_values, keys, values, scale):
    k, v = torch.cat([own_keys, keys], 1), torch.cat([own_values, values], 1)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, k, v)), scale=scale).transpose(1, 2)


@pytest.mark.parametrize('same', [False, True])
@pytest.mark.parametrize('g,m,N', [(1, 1, 20), (3, 2, 7), (1, 1, 0)])
def test_matches_formula(g, m, N, same):
    leaves, args = draw(g, m, N, same)
    out, expected = attend_globally(*args, 0.4), plain(*args, 0.4)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize('same', [False, True])
def test_operator_contract(same):
    _, args = draw(dtype=torch.float32, same=same)
    torch.library.opcheck(torch.ops.ls_vision.global_attention.default, (*args, 0.4))


@pytest.mark.parametrize('dtype,tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    _, args = draw(dtype=dtype)
    out = attend_globally(*args, 0.4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), plain(*(t.double() for t in args), 0.4), rtol=0, atol=tolerance)
    leaves, args = draw(dtype=dtype, size=1e3)
    out = attend_globally(*args, 1.)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, 1e-3 * torch.randn_like(out)))


def test_nothing_but_arguments_is_kept():
    _, args = draw(N=500, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend_globally(*args, 0.4)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in args}
