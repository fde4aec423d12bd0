"""CausalLongShortAttention1d: golden values, streaming, causality, padding, precision, compilation, wrong input."""
import copy

import pytest
import torch
from golden_values import SEQUENCE_GOLDEN, check_gradients, read_golden
from torch._dynamo.testing import CompileCounter

from ls_vision.compat import ChunkedLSAttention
from ls_vision.layers import CausalLongShortAttention1d, CausalState
from ls_vision.layers.sinusoids import sinusoids

pytestmark = pytest.mark.usefixtures('one_thread')


def make(dim=16, num_heads=2, window_size=8, chunk_size=4, **kwargs):
    """A layer whose position biases are not 0."""
    module = CausalLongShortAttention1d(dim, num_heads, window_size=window_size, chunk_size=chunk_size, **kwargs)
    for parameter in (module.r_w_bias, module.r_r_bias):
        torch.nn.init.normal_(parameter)
    return module.eval()


def stream(module, x, sizes):
    """Outputs of a sequence that is cut into pieces of these sizes, and the last state."""
    outputs, state = [], None
    for part in x.split(sizes, dim=1):
        y, state = module(part, state=state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


GEOMETRIES = {
    'rank_1': dict(window_size=8, chunk_size=4),
    'rank_3': dict(window_size=9, chunk_size=5, chunk_rank=3, bias=True),
    'window_is_chunk': dict(window_size=6, chunk_size=6, chunk_rank=2),
    'window_alone': dict(window_size=7, chunk_size=4, chunk_rank=0),
    'smallest': dict(window_size=1, chunk_size=1),
    'clamped': dict(window_size=8, chunk_size=4, chunk_rank=2, clamp_len=3, chunk_clamp_len=5),
    'bounded': dict(window_size=8, chunk_size=4, chunk_rank=2, max_chunks=2),
}


@pytest.mark.parametrize('path', sorted(SEQUENCE_GOLDEN.glob('ar_*')), ids=lambda p: p.stem)
def test_golden_values(path):
    meta, tensors = read_golden(path)
    module = ChunkedLSAttention(
        int(meta['dim']), int(meta['num_heads']), int(meta['chunk']), int(meta['rank']), int(meta['window']), 0.,
        use_bias=meta['use_bias'] == 'True')
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith('param.')}
    assert set(parameters) == set(module.state_dict())
    module.load_state_dict(parameters)
    x, cache = tensors['x'].requires_grad_(), tensors['cache'].requires_grad_()
    arguments = (x, cache, tensors['pos_chunks'], tensors['pos_window'], tensors['chunk_mask'])
    y = module(*arguments)
    y.backward(tensors['grad_y'])
    assert (y - tensors['y']).abs().max() < 1e-5
    check_gradients(module, tensors, vanishing='dconv_1.bias')
    for tensor, expected in ((x, tensors['grad_x']), (cache, tensors['grad_cache'])):
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    module.grad_chk = True
    assert torch.equal(module(*arguments), y)


def test_released_positions_are_those_of_the_layer():
    meta, tensors = read_golden(SEQUENCE_GOLDEN / 'ar_w4_c8_r3_clamp.safetensors')
    dim, clamps = int(meta['dim']), (int(meta['clamp_len']), int(meta['cpos_clamp_len']))
    for name, clamp in zip(('pos_window', 'pos_chunks'), clamps, strict=True):
        distances = torch.arange(tensors[name].shape[1] - 1, -1, -1).clamp(max=clamp)
        torch.testing.assert_close(sinusoids(distances, dim), tensors[name][0])


def dense(module, x):
    """The layer of one sequence (N, C), token by token, from its parameters."""
    h, c, r, w = module.num_heads, module.chunk_size, module.chunk_rank, module.window_size

    def split(t):
        return t.unflatten(-1, (h, -1))  # (tokens, h, d)

    raw_k, raw_v = module.proj_key(x), module.proj_val(x)
    k, v = split(module.dual_ln_win(raw_k)), split(module.dual_ln_win(raw_v))
    q = split(module.proj_query(x)) * module.scale
    outputs = []
    for t in range(len(x)):
        window = range(max(t - w + 1, 0), t + 1)
        near = sinusoids(torch.tensor([min(t - j, module.clamp_len % 10 ** 9) for j in window]), module.dim).to(x)
        logits = [
            ((q[t] + module.r_w_bias[0, :, 0, 0]) * k[window.start:t + 1]).sum(-1)
            + ((q[t] + module.r_r_bias[0, :, 0]) * split(module.r_net(near))).sum(-1)]
        values = [v[window.start:t + 1]]
        for g in range(max(t // c - (module.max_chunks or t), 0), t // c if r else 0):
            chunk = slice(g * c, g * c + c)
            p = split(module.dconv_1(x[chunk])).softmax(0)  # (c, h, r)
            k_g, v_g = (
                split(module.dual_ln_dproj(torch.einsum('chr,chd->rhd', p, split(raw)[chunk]).flatten(1)))
                for raw in (raw_k, raw_v))
            far = torch.tensor([
                min((t // c - g) * r - 1 - rank, module.chunk_clamp_len % 10 ** 9) for rank in range(r)])
            logits.append((q[t] * (k_g + split(module.r_net_chunk(sinusoids(far, module.dim).to(x))))).sum(-1))
            values.append(v_g)
        weights = torch.cat(logits).softmax(0)  # (keys, h)
        outputs.append(torch.einsum('kh,khd->hd', weights, torch.cat(values)).flatten())
    return module.proj_out(torch.stack(outputs))


@pytest.mark.parametrize('kwargs', GEOMETRIES.values(), ids=GEOMETRIES)
def test_matches_dense_formula(kwargs):
    module = make(**kwargs).double()
    x = torch.randn(1, 22, 16, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), dense(module, x[0])
    torch.testing.assert_close(y[0], expected)
    weight = torch.randn_like(expected)
    inputs = [x, *module.parameters()]
    for actual, wanted in zip(
            torch.autograd.grad(y[0], inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('kwargs', GEOMETRIES.values(), ids=GEOMETRIES)
def test_token_by_token(kwargs):
    module, x = make(**kwargs), torch.randn(2, 41, 16)
    with torch.no_grad():
        torch.testing.assert_close(stream(module, x, 1)[0], module(x), rtol=0, atol=1e-5)


def test_500_tokens_one_by_one():
    module, x = make(chunk_rank=2), torch.randn(1, 500, 16)
    with torch.no_grad():
        y, state = stream(module, x, 1)
        torch.testing.assert_close(y, module(x), rtol=0, atol=1e-5)
        # the same state, whichever way the text came
        torch.testing.assert_close(vars(module(x, state=None)[1])['summaries'], state.summaries, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kwargs', GEOMETRIES.values(), ids=GEOMETRIES)
def test_cut_at_random_places(kwargs):
    module, x = make(**kwargs), torch.randn(2, 150, 16, requires_grad=True)
    cuts = sorted(torch.randint(0, 151, (10,)).tolist())  # the same place twice is a call without tokens
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, 150], strict=True)]
    y, expected = stream(module, x, sizes)[0], module(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    weight, inputs = torch.randn_like(y), [x, *module.parameters()]
    for actual, wanted in zip(
            torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kwargs', GEOMETRIES.values(), ids=GEOMETRIES)
def test_jacobian_is_strictly_causal(kwargs):
    module, N = make(**kwargs), 21
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).sum((0, 2)), torch.randn(1, N, 16))
    seen = jacobian[:, 0].abs().amax(-1)  # (query, token)
    assert (seen.triu(1) == 0).all()
    if module.chunk_rank and not module.max_chunks:
        assert (seen[torch.ones(N, N).tril().bool()] > 0).all()


def test_released_module_has_a_gap_where_the_window_is_shorter_than_a_chunk():
    module = ChunkedLSAttention(16, 2, chunk_size=8, chunk_rank=1, window_len=4, dropout=0.).eval()
    positions = [sinusoids(torch.arange(n).flip(0), 16)[None] for n in (2, 4)]
    jacobian = torch.autograd.functional.jacobian(
        lambda x: module(x, x[:, :0], *positions).sum((0, 2)), torch.randn(1, 16, 16))
    seen = jacobian[:, 0].abs().amax(-1) > 0
    assert (~seen[torch.ones(16, 16).tril().bool()]).sum() == 20


@pytest.mark.parametrize('side', ['left', 'right', 'anywhere'])
def test_padding_equals_cutting(side):
    module = make(bias=True, chunk_rank=2)
    x = torch.randn(4, 31, 16)
    lengths = torch.tensor([31, 18, 1, 0])[:, None]
    places = torch.arange(31)
    padding = {'left': places < 31 - lengths, 'right': places >= lengths, 'anywhere': torch.rand(4, 31) < 0.5}[side]
    x[padding] = float('nan')
    x.requires_grad_()
    y = module(x, padding)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())
    assert (x.grad[padding] == 0).all()
    for row, mask in enumerate(padding):
        if not mask.all():
            torch.testing.assert_close(y[row][~mask], module(x[row][~mask][None])[0], rtol=0, atol=1e-5)
    assert torch.equal(y[padding], module.proj_out.bias.expand_as(y[padding]))


def test_texts_of_different_lengths_with_a_state():
    module, x = make(bias=True, chunk_rank=2), torch.randn(3, 60, 16)
    padding = torch.zeros(3, 60, dtype=torch.bool)
    padding[0, :11] = padding[1, 20:37] = True  # on the left, and in the middle
    x[padding] = float('nan')
    with torch.no_grad():
        expected = module(x, padding)
        outputs, state, order = [], None, torch.tensor([2, 0, 1])
        for start, stop in ((0, 15), (15, 37), (37, 38), (38, 38), (38, 60)):
            mask = padding[:, start:stop] if padding[:, start:stop].any() else None
            y, state = module(x[:, start:stop], mask, state=state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-5)
        assert state.num_tokens == [49, 43, 60] and state.num_bytes == sum(row.num_bytes for row in state.rows())
        more = torch.randn(3, 2, 16)
        y, _ = module(more, state=state.reorder(order).detach())
        whole = torch.cat([x[order], more], 1), torch.cat([padding[order], torch.zeros(3, 2, dtype=torch.bool)], 1)
        torch.testing.assert_close(y, module(*whole)[:, -2:], rtol=0, atol=1e-5)
        # a mask of no padding changes nothing
        assert type(module(x[:, 40:], padding[:, 40:], state=None)[1]) is CausalState
    with pytest.raises(ValueError, match='index has 3, expected rows 0 to 2 of the batch'):
        state.reorder(torch.tensor([3]))
    with pytest.raises(ValueError, match='state has a batch of 3, x one of 2'):
        module(x[:2], state=state)


def test_state_size():
    module, C, w, c, r = make(window_size=8, chunk_size=4, chunk_rank=2), 16, 8, 4, 2
    for n in (3, 8, 61, 400):
        state = module(torch.randn(1, n, 16), state=None)[1]
        open_chunk = r * (2 * C + module.num_heads) if n % c else 0
        assert state.num_bytes == 4 * (min(n, w - 1) * 2 * C + n // c * r * 2 * C + open_chunk)
        # nothing larger is kept alive behind the tensors
        tensors = [t for t in vars(state).values() if isinstance(t, torch.Tensor)]
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= state.num_bytes + 4 * n * C


def test_state_of_bounded_size():
    module, sizes = make(chunk_rank=2, max_chunks=3), set()
    state, x = None, torch.randn(1, 100, 16)
    with torch.no_grad():
        for i in range(100):
            _, state = module(x[:, i:i + 1], state=state)
            sizes.add(state.summaries.untyped_storage().nbytes() if i > 20 else 0)
    assert state.summaries.shape[1] == 3 * 2
    assert max(sizes) <= 2 * (3 * 2 + 1) * 2 * 16 * 4  # nothing larger is kept alive behind it


def test_reorder_and_detach():
    module, x, more = make(chunk_rank=2), torch.randn(3, 30, 16, requires_grad=True), torch.randn(4, 7, 16)
    index = torch.tensor([2, 0, 0, 1])
    _, state = module(x, state=None)
    y, _ = module(more, state=state.reorder(index))
    torch.testing.assert_close(y, module(torch.cat([x[index], more], 1))[:, 30:], rtol=0, atol=1e-5)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    detached = state.detach()
    assert not any(t.requires_grad for t in vars(detached).values() if isinstance(t, torch.Tensor))
    assert detached.num_bytes == state.num_bytes
    for wrong in ([0, 1], torch.zeros(2), torch.zeros(1, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r'index is .*, expected a tensor of integers \(batch,\)'):
            state.reorder(wrong)


def test_a_state_can_be_continued_twice():
    module, x, more = make(), torch.randn(1, 18, 16), torch.randn(2, 1, 9, 16)
    _, state = module(x, state=None)
    for part in more:
        torch.testing.assert_close(
            module(part, state=state)[0], module(torch.cat([x, part], 1))[:, 18:], rtol=0, atol=1e-5)


def test_released_summaries():
    module, x = make(summaries='released', chunk_rank=2), torch.randn(2, 48, 16)
    uniform = make(chunk_rank=2)
    uniform.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), uniform(x))  # without memory they are the same
    # a memory as the released module has it, but not of zeros in front of the text
    released = ChunkedLSAttention(16, 2, 4, 2, 8, 0.)
    released.load_state_dict(module.state_dict())
    positions = [sinusoids(torch.arange(n).flip(0), 16)[None] for n in (24, 8)]
    expected = released(x[:, 20:], x[:, :20], *positions)
    actual = stream(module, x, [8, 12, 28])[0][:, 20:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(actual, uniform(x)[:, 20:], atol=1e-2)
    with pytest.raises(ValueError, match=r"x has 30 tokens, with summaries='released' .* a multiple of chunk_size 4"):
        module(x[:, :30], state=None)


def test_released_module_takes_any_segment_and_no_memory():
    module = ChunkedLSAttention(16, 2, 4, 1, 8, 0.)
    x = torch.randn(1, 27, 16)
    positions = [sinusoids(torch.arange(n).flip(0), 16)[None] for n in (6, 8)]
    uniform = make()
    uniform.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, x[:, :0], *positions), uniform(x))
    with pytest.raises(ValueError, match='h_cache has 3 tokens, expected a multiple of chunk_size 4'):
        module(x, x[:, :3], *positions)
    with pytest.raises(ValueError, match=r'key_pe has shape \[1, 8, 16\], expected \[1, 6, 16\]'):
        module(x, x[:, :0], positions[1], positions[1])


def test_positions_are_kept_until_a_parameter_changes():
    module, x = make(), torch.randn(1, 30, 16)
    with torch.no_grad():
        module(x)
        for parameter in (module.r_net.weight, module.r_net_chunk.weight, module.r_net_chunk.bias):
            parameter.data.mul_(-2)
            before = module(x)
        kept = module(x)
    torch.testing.assert_close(kept, module(x))  # with gradients nothing is kept
    assert torch.equal(kept, before)


@pytest.mark.parametrize('dtype,tolerance', [(torch.bfloat16, 5e-2), (torch.float16, 6e-3)])
def test_half_precision(dtype, tolerance):
    module, x = make(), torch.randn(2, 37, 16)
    expected = module(x)
    with torch.autocast('cpu', dtype):
        assert (module(x) - expected).abs().max() < tolerance
        assert (stream(module, x, 5)[0] - expected).abs().max() < tolerance
    module = module.to(dtype)
    y = module(x.to(dtype))
    y.sum().backward()
    assert y.dtype == dtype and (y - expected).abs().max() < tolerance
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert (stream(module, x.to(dtype), 5)[0] - expected).abs().max() < tolerance


def test_dropout_path_gives_the_same_without_dropping():
    module, x = make(attn_drop=1e-9), torch.randn(2, 21, 16)
    torch.testing.assert_close(module.train()(x), module.eval()(x))


@pytest.mark.parametrize('shape', [(2, 0, 16), (0, 5, 16), (1, 1, 16)])
def test_few_tokens(shape):
    x = torch.randn(shape, requires_grad=True)
    y, state = make()(x, state=None)
    y.sum().backward()
    assert y.shape == x.shape and state.num_tokens == shape[1] and x.grad.isfinite().all()


def test_compiles_once_for_all_lengths():
    module, counter = make(), CompileCounter()
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for N in (17, 30, 39, 44, 53, 64):
        x = torch.randn(2, N, 16)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count <= 2  # with and without an open chunk at the end


@pytest.mark.parametrize('arguments,message', [
    (dict(window_size=8, chunk_size=9), 'window_size 8 is smaller than chunk_size 9'),
    (dict(num_heads=3), 'dim 16 is not divisible by num_heads 3'),
    (dict(window_size=0), 'window_size is 0, expected 1 or more'),
    (dict(chunk_size=0), 'chunk_size is 0, expected 1 or more'),
    (dict(chunk_rank=-1), 'chunk_rank is -1, expected 0 or more'),
    (dict(max_chunks=0), 'max_chunks is 0, expected 1 or more'),
    (dict(clamp_len=-2), 'clamp_len is -2, expected -1 or more'),
    (dict(summaries='pooled'), "summaries is 'pooled', expected one of 'uniform', 'released'"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLongShortAttention1d(16, **{**dict(num_heads=2, window_size=8, chunk_size=4), **arguments})


def test_wrong_state():
    module, x = make(), torch.randn(2, 9, 16)
    _, state = module(x, state=None)
    for wrong, message in (
            ('last', 'state is a str, expected None or the state of an earlier call'),
            (make()(x, state=None)[1], 'state is that of another module'),
            (copy.deepcopy(module)(x, state=None)[1], 'state is that of another module'),
            (state.reorder(torch.tensor([0])), 'state has a batch of 1, x one of 2'),
            (module.double()(x.double(), state=None)[1], 'state is torch.float64 on cpu and x torch.float32')):
        with pytest.raises(ValueError, match=message):
            module.float()(x, state=wrong)


@pytest.mark.parametrize('arguments,kwargs,message', [
    ((torch.zeros(2, 9, 8),), {}, r'x has shape \[2, 9, 8\], expected \(batch, tokens, 16\)'),
    ((torch.zeros(2, 9, 16), torch.zeros(2, 8, dtype=torch.bool)), {}, r'mask has shape \[2, 8\], expected \[2, 9\]'),
    ((torch.zeros(2, 9, 16), torch.ones(2, 9)), {}, 'expected a bool tensor, True where a token is PADDING'),
])
def test_wrong_input(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make()(*arguments, **kwargs)
