"""Fused Triton kernels of the long-range half: summaries of all tokens, and the attention of global tokens.

Both are weighted sums over the N tokens of an image with a softmax over them: `ROWS` of them for each head, which are
the ranks or the global queries. Logits of summaries are given, those of global tokens are products. A program owns the
rows of a head and walks over a chunk of the tokens, which it reads once where they are. With one chunk per image
(`SINGLE`) it writes the result, otherwise its part of it, and `merge_kernel` adds up the parts.

Shapes: B batch, N tokens, h heads, d head width, D the next power of two, R rows (`ROWS` the next power of two, 16 or
more); `KINDS` tensors are summed at once, keys and values. Sums are (B, R, KINDS, h, d), peak and log_total (B, R, h).
A part has one more dimension in front, and holds sums of weights relative to its own peak.
"""
import triton
import triton.language as tl

from .kernels import _LOG2E, _accumulate, _dot, _dot_logits, _load_rows, _locate, _next_weights, _store_rows, _weights

# see `kernels`: one compiled kernel serves images of all sizes
_SIZES = ['B', 'h', 'N', 'splits', 'chunk', 'rows']
_STATISTICS = ['peak_ptr', 'log_total_ptr']


@triton.jit
def _store_sums(
        out_ptr, peak_ptr, log_total_ptr, first, second, peak, total, row, split, batch, head, B, h,
        R: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, KINDS: tl.constexpr, SINGLE: tl.constexpr,
):
    """Sums of a head, and of the second kind if there are two, with their statistics; or the same of a part."""
    if SINGLE:
        first, second, total = first / total[:, None], second / total[:, None], tl.log(total)
    image = (split.to(tl.int64) * B + batch) * R
    offset = (row * KINDS * h) * HEAD_DIM
    out_ptr += (image * KINDS * h + head) * HEAD_DIM
    _store_rows(out_ptr, offset, first, row < R, HEAD_DIM, D)
    if KINDS == 2:
        _store_rows(out_ptr + h * HEAD_DIM, offset, second, row < R, HEAD_DIM, D)
    tl.store(peak_ptr + image * h + head + row * h, peak, mask=row < R)
    tl.store(log_total_ptr + image * h + head + row * h, total, mask=row < R)


@triton.jit
def _load_scores(scores_ptr, row, token, count, s_r, s_n, R: tl.constexpr):
    """Scores of a block of tokens, (ROWS, BLOCK_K) float32; -inf where there are none."""
    mask = (row < R)[:, None] & (token < count)[None, :]
    scores = tl.load(scores_ptr + row[:, None] * s_r + token[None, :] * s_n, mask=mask, other=float('-inf'))
    return scores.to(tl.float32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STATISTICS)
def summaries_kernel(
        scores_ptr, x_ptr, out_ptr, peak_ptr, log_total_ptr,
        s_b, s_h, s_r, s_n, x_b, x_n, x_kind, x_h, B, h, N, splits, chunk,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr,
        SINGLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Tokens of a chunk, weighted by the softmax of their scores -> sums and statistics."""
    batch, head, split = _locate(tl.program_id(0), splits, B, h, False)
    begin = split.to(tl.int64) * chunk
    scores_ptr += batch.to(tl.int64) * s_b + head.to(tl.int64) * s_h + begin * s_n
    x_ptr += batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + begin * x_n
    count = tl.minimum(chunk, N - split * chunk)

    row = tl.arange(0, ROWS)
    peak = tl.full((ROWS,), float('-inf'), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS, D), tl.float32)
    second = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, count, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, token * x_n, token < count, HEAD_DIM, D)  # (BLOCK_K, D)
        logits = _load_scores(scores_ptr, row, token, count, s_r, s_n, R)
        weights, decay, peak, total = _next_weights(logits, peak, total)
        weights = weights.to(x.dtype)
        first = _dot(weights, x, first * decay[:, None], PRECISION)
        if KINDS == 2:
            x = _load_rows(x_ptr + x_kind, token * x_n, token < count, HEAD_DIM, D)
            second = _dot(weights, x, second * decay[:, None], PRECISION)
    _store_sums(
        out_ptr, peak_ptr, log_total_ptr, first, second, peak, total, row, split, batch, head, B, h,
        R, HEAD_DIM, D, KINDS, SINGLE)


@triton.jit
def _load_sums_gradient(
        out_ptr, dout_ptr, peak_ptr, log_total_ptr, dlse_ptr, row, batch, head, h,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, KINDS: tl.constexpr, HAS_LSE: tl.constexpr,
):
    """Gradients of both kinds of sums (ROWS, D), peak, log_total, and delta, which all tokens' weights have in common:
    sum(out * dout) less the gradient of the log-sum-exp. (ROWS,)"""
    image = batch.to(tl.int64) * R
    offset = (row * KINDS * h) * HEAD_DIM
    corner = (image * KINDS * h + head) * HEAD_DIM
    first = _load_rows(dout_ptr + corner, offset, row < R, HEAD_DIM, D)
    delta = tl.sum(first.to(tl.float32) * _load_rows(out_ptr + corner, offset, row < R, HEAD_DIM, D).to(tl.float32), 1)
    second = first
    if KINDS == 2:
        corner += h * HEAD_DIM
        second = _load_rows(dout_ptr + corner, offset, row < R, HEAD_DIM, D)
        out = _load_rows(out_ptr + corner, offset, row < R, HEAD_DIM, D)
        delta += tl.sum(second.to(tl.float32) * out.to(tl.float32), 1)
    statistics = image * h + head + row * h
    if HAS_LSE:
        delta -= tl.load(dlse_ptr + statistics, mask=row < R, other=0.)
    peak = tl.load(peak_ptr + statistics, mask=row < R, other=0.)
    log_total = tl.load(log_total_ptr + statistics, mask=row < R, other=0.)
    return first, second, peak, log_total, delta


@triton.jit
def _spread(weights, dout, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """weights^T @ dout, (tokens, D): what each token of a sum gets of the sum's gradient.

    Weights of many tokens are small: the factor keeps their digits in float16.
    """
    weights = tl.trans((weights * FACTOR).to(dout.dtype))
    return _dot(weights, dout, tl.zeros((weights.shape[0], dout.shape[1]), tl.float32), PRECISION) * (1. / FACTOR)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STATISTICS)
def summaries_gradient_kernel(
        scores_ptr, x_ptr, out_ptr, peak_ptr, log_total_ptr, dout_ptr, dlse_ptr, dscores_ptr, dx_ptr,
        s_b, s_h, s_r, s_n, x_b, x_n, x_kind, x_h, B, h, N, splits, chunk,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr,
        HAS_LSE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The same walk -> dscores (B, N, h, R) and dx (B, N, KINDS, h, d)."""
    batch, head, split = _locate(tl.program_id(0), splits, B, h, False)
    begin = split.to(tl.int64) * chunk
    scores_ptr += batch.to(tl.int64) * s_b + head.to(tl.int64) * s_h + begin * s_n
    x_ptr += batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + begin * x_n
    count = tl.minimum(chunk, N - split * chunk)
    image = batch.to(tl.int64) * N + begin
    dscores_ptr += (image * h + head) * R
    dx_ptr += (image * KINDS * h + head) * HEAD_DIM

    row = tl.arange(0, ROWS)
    first, second, peak, log_total, delta = _load_sums_gradient(
        out_ptr, dout_ptr, peak_ptr, log_total_ptr, dlse_ptr, row, batch, head, h, HEAD_DIM, D, R, KINDS, HAS_LSE)
    for start in range(0, count, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        valid = token < count
        weights = _weights(
            _load_scores(scores_ptr, row, token, count, s_r, s_n, R), peak[:, None], log_total[:, None])
        x = _load_rows(x_ptr, token * x_n, valid, HEAD_DIM, D)
        dweights = _dot(first, tl.trans(x), tl.zeros((ROWS, BLOCK_K), tl.float32), PRECISION)
        offset = token * (KINDS * h * HEAD_DIM)
        _store_rows(dx_ptr, offset, _spread(weights, first, FACTOR, PRECISION), valid, HEAD_DIM, D)
        if KINDS == 2:
            x = _load_rows(x_ptr + x_kind, token * x_n, valid, HEAD_DIM, D)
            dweights = _dot(second, tl.trans(x), dweights, PRECISION)
            _store_rows(
                dx_ptr + h * HEAD_DIM, offset, _spread(weights, second, FACTOR, PRECISION), valid, HEAD_DIM, D)
        dscores = weights * (dweights - delta[:, None])
        tl.store(
            dscores_ptr + token[None, :] * (h * R) + row[:, None], dscores.to(dscores_ptr.dtype.element_ty),
            mask=(row < R)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STATISTICS)
def global_attention_kernel(
        q_ptr, own_k_ptr, own_v_ptr, k_ptr, v_ptr, out_ptr, peak_ptr, log_total_ptr,
        q_b, q_r, q_h, own_b, own_m, own_h, k_b, k_n, k_h, B, h, N, splits, chunk, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
        SINGLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Global queries against a chunk of the tokens, the first one against the M own keys as well -> out, statistics."""
    batch, head, split = _locate(tl.program_id(0), splits, B, h, False)
    begin = split.to(tl.int64) * chunk
    row = tl.arange(0, ROWS)
    q_ptr += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q = _load_rows(q_ptr, row * q_r, row < R, HEAD_DIM, D)  # (ROWS, D)
    peak = tl.full((ROWS,), float('-inf'), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)

    own = batch.to(tl.int64) * own_b + head.to(tl.int64) * own_h
    for start in range(0, tl.where(split == 0, M, 0), BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        k = _load_rows(own_k_ptr + own, token * own_m, token < M, HEAD_DIM, D)
        v = _load_rows(own_v_ptr + own, token * own_m, token < M, HEAD_DIM, D)
        logits = tl.where((token < M)[None, :], _dot_logits(q, k, scale, PRECISION), float('-inf'))
        peak, total, acc = _accumulate(logits, v, peak, total, acc, PRECISION)

    corner = batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h + begin * k_n
    count = tl.minimum(chunk, N - split * chunk)
    for start in range(0, count, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        k = _load_rows(k_ptr + corner, token * k_n, token < count, HEAD_DIM, D)
        v = _load_rows(v_ptr + corner, token * k_n, token < count, HEAD_DIM, D)
        logits = tl.where((token < count)[None, :], _dot_logits(q, k, scale, PRECISION), float('-inf'))
        peak, total, acc = _accumulate(logits, v, peak, total, acc, PRECISION)
    _store_sums(
        out_ptr, peak_ptr, log_total_ptr, acc, acc, peak, total, row, split, batch, head, B, h,
        R, HEAD_DIM, D, 1, SINGLE)


@triton.jit
def _global_gradient(
        q, dout, k, v, valid, peak, log_total, delta, scale, dq, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of a block of keys: dq with their part, dk, dv."""
    logits = tl.where(valid[None, :], _dot_logits(q, k, scale, PRECISION), float('-inf'))
    weights = _weights(logits, peak[:, None], log_total[:, None])
    dweights = _dot(dout, tl.trans(v), tl.zeros(logits.shape, tl.float32), PRECISION)
    dlogits = weights * (dweights - delta[:, None]) * scale
    dq = _dot(dlogits.to(k.dtype), k, dq, PRECISION)
    return dq, _spread(dlogits, q, FACTOR, PRECISION), _spread(weights, dout, FACTOR, PRECISION)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STATISTICS)
def global_gradient_kernel(
        q_ptr, own_k_ptr, own_v_ptr, k_ptr, v_ptr, out_ptr, peak_ptr, log_total_ptr, dout_ptr, dlse_ptr,
        dq_ptr, down_ptr, dx_ptr,
        q_b, q_r, q_h, own_b, own_m, own_h, k_b, k_n, k_h, B, h, N, splits, chunk, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
        KINDS: tl.constexpr, HAS_LSE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """The same walk -> its part of dq (splits, B, R, h, d), gradients of own keys and values (B, M, 2, h, d) and of the
    tokens (B, N, KINDS, h, d), added up where keys and values are the same tensor (KINDS 1)."""
    batch, head, split = _locate(tl.program_id(0), splits, B, h, False)
    begin = split.to(tl.int64) * chunk
    row = tl.arange(0, ROWS)
    q_ptr += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q = _load_rows(q_ptr, row * q_r, row < R, HEAD_DIM, D)  # (ROWS, D)
    dout, _, peak, log_total, delta = _load_sums_gradient(
        out_ptr, dout_ptr, peak_ptr, log_total_ptr, dlse_ptr, row, batch, head, h, HEAD_DIM, D, R, 1, HAS_LSE)
    dq = tl.zeros((ROWS, D), tl.float32)

    own = batch.to(tl.int64) * own_b + head.to(tl.int64) * own_h
    down_ptr += (batch.to(tl.int64) * M * 2 * h + head) * HEAD_DIM
    for start in range(0, tl.where(split == 0, M, 0), BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        valid = token < M
        k = _load_rows(own_k_ptr + own, token * own_m, valid, HEAD_DIM, D)
        v = _load_rows(own_v_ptr + own, token * own_m, valid, HEAD_DIM, D)
        dq, dk, dv = _global_gradient(q, dout, k, v, valid, peak, log_total, delta, scale, dq, FACTOR, PRECISION)
        offset = token * (2 * h * HEAD_DIM)
        _store_rows(down_ptr, offset, dk, valid, HEAD_DIM, D)
        _store_rows(down_ptr + h * HEAD_DIM, offset, dv, valid, HEAD_DIM, D)

    corner = batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h + begin * k_n
    dx_ptr += ((batch.to(tl.int64) * N + begin) * KINDS * h + head) * HEAD_DIM
    count = tl.minimum(chunk, N - split * chunk)
    for start in range(0, count, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        valid = token < count
        k = _load_rows(k_ptr + corner, token * k_n, valid, HEAD_DIM, D)
        v = _load_rows(v_ptr + corner, token * k_n, valid, HEAD_DIM, D)
        dq, dk, dv = _global_gradient(q, dout, k, v, valid, peak, log_total, delta, scale, dq, FACTOR, PRECISION)
        offset = token * (KINDS * h * HEAD_DIM)
        if KINDS == 1:
            _store_rows(dx_ptr, offset, dk + dv, valid, HEAD_DIM, D)
        else:
            _store_rows(dx_ptr, offset, dk, valid, HEAD_DIM, D)
            _store_rows(dx_ptr + h * HEAD_DIM, offset, dv, valid, HEAD_DIM, D)
    dq_ptr += ((split.to(tl.int64) * B + batch) * R * h + head) * HEAD_DIM
    _store_rows(dq_ptr, row * h * HEAD_DIM, dq, row < R, HEAD_DIM, D)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STATISTICS)
def merge_kernel(
        parts_ptr, part_peaks_ptr, part_totals_ptr, out_ptr, peak_ptr, log_total_ptr, h, rows, splits,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, KINDS: tl.constexpr,
):
    """Parts of a row's sums -> its sums and statistics. A program owns one of the B * R * h rows."""
    program = tl.program_id(0)
    dim = tl.arange(0, D)
    peak = tl.load(part_peaks_ptr + program)
    for split in range(1, splits):
        peak = tl.maximum(peak, tl.load(part_peaks_ptr + split * rows + program))
    total = tl.full((), 0., tl.float32)
    first = tl.zeros((D,), tl.float32)
    second = tl.zeros((D,), tl.float32)
    offset = (program // h * KINDS * h + program % h) * HEAD_DIM
    for split in range(0, splits):
        share = tl.exp2((tl.load(part_peaks_ptr + split * rows + program) - peak) * _LOG2E)
        total += share * tl.load(part_totals_ptr + split * rows + program)
        part = split * rows * KINDS * HEAD_DIM + offset
        first += share * tl.load(parts_ptr + part + dim, mask=dim < HEAD_DIM, other=0.)
        if KINDS == 2:
            second += share * tl.load(parts_ptr + part + h * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.)
    tl.store(out_ptr + offset + dim, (first / total).to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    if KINDS == 2:
        tl.store(
            out_ptr + offset + h * HEAD_DIM + dim, (second / total).to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(peak_ptr + program, peak)
    tl.store(log_total_ptr + program, tl.log(total))
