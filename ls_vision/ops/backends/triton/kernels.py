"""Fused Triton kernels of long-short attention, forward and backward, for windows of at least one token.

Shapes: B batch, H x W grid of local tokens, h heads, d head width, D the next power of two, M additional keys; in a
window Q queries and K keys, which reach over it by a margin on each side; peak, log_total and delta (B, h, H, W)
float32.

Everything is read from and written to the raster; no tile of keys is ever in memory. The unit of work is a tile of
`TILE_ROWS` x `TILE_COLS` tokens, one window or several whole ones. A kernel owns a block of a tile's tokens and walks
over the tokens that these interact with. They are numbered row by row and taken in blocks; rows and columns come from
divisions by constants. With one window per tile (`SINGLE`) any query and key that meet are in the same window. With
several, pairs have to be masked.

Forward, query gradient and bias gradient walk over the keys of a tile of queries: the tile grown by the margins. The
key gradient walks over the queries of a tile of keys. Its tiles begin a margin before the grid's corner. Then their
keys are among those of the tile's own windows and of the windows before, by default one, but of no window after, and
there are no more pairs to visit than in the forward pass.

Logits of pairs that do not exist are -inf, and of keys that are padding where the mask (B, H, W) says so. A query that
is left without a key has the peak 0, the sum 1 and the output 0. Weights are recomputed in the backward pass as
exp(logit - peak - log_total), from the largest logit of a query and the logarithm of its sum of exponentials. The
log-sum-exp, which is their sum, would not do: in float32 one of 10,000 leaves a weight three digits. Where a tile
begins is a 64-bit offset, offsets within tiles are 32 bit.
"""
import triton
import triton.language as tl

# numpy has no bfloat16, so dots of the interpreter run in float32, on operands that were rounded to bfloat16
_INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
_LOG2E = tl.constexpr(1.4426950408889634)
# One compiled kernel serves images of all sizes. Strides stay specialised: vectors are loaded where 16 divides them.
_SIZES = ['B', 'H', 'W', 'tiles_y', 'tiles_x', 'offset_y', 'offset_x', 'splits', 'chunk', 'groups']
# Halves of a tensor: where the second begins depends on the size. The mask is read byte by byte.
_UNALIGNED = ['peak_ptr', 'log_total_ptr', 'padding_ptr']


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if _INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _locate(program, tiles, B, h, HEAD_MAJOR: tl.constexpr):
    """Batch, head and tile of a program.

    Programs that run at the same time should be neighbours on the grid, which share keys, and of the same head if they
    share its bias. Without a bias they better read all heads of a token.
    """
    if HEAD_MAJOR:
        return program // tiles % B, program // (tiles * B), program % tiles
    else:
        return program // (tiles * h), program % h, program // h % tiles


@triton.jit
def _corner(batch, head, row, col, stride_b, stride_y, stride_x, stride_h):
    """64-bit offset of a token's head."""
    return (
        batch.to(tl.int64) * stride_b + row.to(tl.int64) * stride_y + col.to(tl.int64) * stride_x
        + head.to(tl.int64) * stride_h
    )


@triton.jit
def _token_corner(batch, head, row, col, h, H, W):
    """64-bit number of a token's head in a (B, H, W, h) tensor."""
    return ((batch.to(tl.int64) * H + row) * W + col) * h + head


@triton.jit
def _map_corner(batch, head, row, col, h, H, W):
    """64-bit number of a token in a (B, h, H, W) tensor."""
    return ((batch.to(tl.int64) * h + head) * H + row) * W + col


@triton.jit
def _load_rows(ptr, offset, valid, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The d entries at each of n offsets, zeros where not valid. (n, D)"""
    dim = tl.arange(0, D)
    mask = valid[:, None]
    if HEAD_DIM != D:
        mask = mask & (dim < HEAD_DIM)[None, :]
    return tl.load(ptr + offset[:, None] + dim[None, :], mask=mask, other=0.)


@triton.jit
def _store_rows(ptr, offset, x, valid, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    dim = tl.arange(0, D)
    mask = valid[:, None]
    if HEAD_DIM != D:
        mask = mask & (dim < HEAD_DIM)[None, :]
    tl.store(ptr + offset[:, None] + dim[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divide(index, DIVISOR: tl.constexpr):
    """index // DIVISOR in two instructions, exact for 0 <= index < 2^20 / DIVISOR. Each thread divides many times."""
    return index * ((1 << 20) // DIVISOR + 1) >> 20


@triton.jit
def _on_grid(row, col, H, W):
    # as unsigned numbers negative ones are too large
    return (row.to(tl.uint32) < H) & (col.to(tl.uint32) < W)


@triton.jit
def _in_window(
        q_row, q_col, k_row, k_col,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
):
    """Is the key one of the query's window? Coordinates broadcast, and are counted from the corner of some window that
    no query lies before."""
    row = k_row - _divide(q_row, WINDOW_ROWS) * WINDOW_ROWS + ROW_MARGIN
    col = k_col - _divide(q_col, WINDOW_COLS) * WINDOW_COLS + COL_MARGIN
    return _on_grid(row, col, WINDOW_ROWS + 2 * ROW_MARGIN, WINDOW_COLS + 2 * COL_MARGIN)


@triton.jit
def _load_bias(bias_ptr, stride, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A block of a bias table whose rows are padded to a multiple of 16, (rows, columns) float32.

    Vectors of the load must not be split by the mask, so it is that of the padded table.
    """
    mask = (row < ROWS)[:, None] & (col < (COLS + 15) // 16 * 16)[None, :]
    return tl.load(bias_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.).to(tl.float32)


@triton.jit
def _query_block(block, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Numbers of the queries in a block of a tile, their rows and columns, and which of them there are. (BLOCK_Q,)"""
    index = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = _divide(index, TILE_COLS)
    return index, row, index - row * TILE_COLS, index < TILE_ROWS * TILE_COLS


@triton.jit
def _range_on_grid(first_row, H, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of those tokens of ROWS x COLS, from a row on, that are in rows of the grid.

    Of the rows in front whole blocks are left out, not parts, which keeps the bias table's vectors aligned.
    """
    return tl.maximum(-first_row, 0) * COLS // BLOCK * BLOCK, tl.minimum(ROWS, H - first_row) * COLS


@triton.jit
def _is_interior(
        row0, col0, H, W, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Are all keys of a tile on the grid, and those that the last block has too many as well?"""
    READ: tl.constexpr = ((ROWS * COLS + BLOCK_K - 1) // BLOCK_K * BLOCK_K + COLS - 1) // COLS
    rows_inside = (row0 >= ROW_MARGIN) & (row0 + (READ - ROW_MARGIN) <= H)
    return rows_inside & (col0 >= COL_MARGIN) & (col0 + (COLS - COL_MARGIN) <= W)


@triton.jit
def _load_window_keys(
        k_ptr, v_ptr, padding_ptr, k_index, row0, col0, k_y, k_x, v_y, v_x, H, W,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, HAS_PADDING: tl.constexpr, INTERIOR: tl.constexpr,
):
    """Keys by their number in the ROWS x COLS tokens in and around a tile -> k, v (BLOCK_K, D), rows and columns
    counted from the tile's corner, which the pointers are at, and which of them exist (BLOCK_K,).

    Of an interior tile all can be read, and only those too many in the last block, in the row below, do not exist.
    """
    row = _divide(k_index, COLS)
    row, col = row - ROW_MARGIN, k_index - row * COLS - COL_MARGIN
    if INTERIOR:
        inside = k_index < ROWS * COLS
        readable = tl.full(k_index.shape, True, tl.int1)
    else:
        # surplus keys of the last block lie in the row below the tile's last
        inside = _on_grid(row0 + row, col0 + col, tl.minimum(row0 + (ROWS - ROW_MARGIN), H), W)
        readable = inside
    if HAS_PADDING:
        inside = inside & (tl.load(padding_ptr + row * W + col, mask=inside, other=1) == 0)
    k = _load_rows(k_ptr, row * k_y + col * k_x, readable, HEAD_DIM, D)
    v = _load_rows(v_ptr, row * v_y + col * v_x, readable, HEAD_DIM, D)
    return k, v, row, col, inside


@triton.jit
def _load_additional(ak_ptr, av_ptr, m_index, ak_m, av_m, M: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Additional keys and values by their numbers. (n, D)"""
    k = _load_rows(ak_ptr, m_index * ak_m, m_index < M, HEAD_DIM, D)
    return k, _load_rows(av_ptr, m_index * av_m, m_index < M, HEAD_DIM, D)


@triton.jit
def _dot_logits(rows, cols, scale, PRECISION: tl.constexpr):
    """Logits but for bias and masks. (n, m)"""
    return _dot(rows, tl.trans(cols), tl.zeros((rows.shape[0], cols.shape[0]), tl.float32), PRECISION) * scale


@triton.jit
def _window_logits(
        q, k, bias_ptr, bias_q, q_index, q_row, q_col, k_index, k_row, k_col, k_inside, scale,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Logits of a tile's queries and keys, of which there are QUERIES and KEYS in all. (BLOCK_Q, BLOCK_K)"""
    logits = _dot_logits(q, k, scale, PRECISION)
    if HAS_BIAS:  # after the product, to take no registers from it
        logits += _load_bias(bias_ptr, bias_q, q_index, k_index, QUERIES, KEYS)
    elif QUERIES != WINDOW_ROWS * WINDOW_COLS:
        in_window = _in_window(
            q_row[:, None], q_col[:, None], k_row[None, :], k_col[None, :],
            WINDOW_ROWS, WINDOW_COLS, ROW_MARGIN, COL_MARGIN)
        logits = tl.where(in_window, logits, float('-inf'))
    return tl.where(k_inside[None, :], logits, float('-inf'))


@triton.jit
def _window_block(
        start, q, k_ptr, v_ptr, bias_ptr, padding_ptr, bias_q, q_index, q_row, q_col, row0, col0, k_y, k_x, v_y, v_x,
        H, W, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        QUERIES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, INTERIOR: tl.constexpr,
):
    """A block of a tile's keys -> its logits (BLOCK_Q, BLOCK_K), k, v (BLOCK_K, D)."""
    k_index = tl.multiple_of(start, BLOCK_K) + tl.arange(0, BLOCK_K)
    k, v, k_row, k_col, k_inside = _load_window_keys(
        k_ptr, v_ptr, padding_ptr, k_index, row0, col0, k_y, k_x, v_y, v_x, H, W, HEAD_DIM, D, ROW_MARGIN, COL_MARGIN,
        ROWS, COLS, HAS_PADDING, INTERIOR)
    logits = _window_logits(
        q, k, bias_ptr, bias_q, q_index, q_row, q_col, k_index, k_row, k_col, k_inside, scale,
        WINDOW_ROWS, WINDOW_COLS, ROW_MARGIN, COL_MARGIN, QUERIES, ROWS * COLS, HAS_BIAS, PRECISION)
    return logits, k, v


@triton.jit
def _next_weights(logits, peak, total):
    """One step of the online softmax: weights relative to the new running maximum, the factor that makes earlier ones
    relative to it, the maximum, the sum of weights."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # a row that has met no key yet must not become nan
    shift = tl.where(new_peak == float('-inf'), 0., new_peak) * _LOG2E
    weights = tl.exp2(tl.fma(logits, _LOG2E, -shift[:, None]))
    decay = tl.exp2(peak * _LOG2E - shift)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def _accumulate(logits, v, peak, total, acc, PRECISION: tl.constexpr):
    """A step with a block of values: running maximum, sum of weights and weighted sum of values."""
    weights, decay, peak, total = _next_weights(logits, peak, total)
    return peak, total, _dot(weights.to(v.dtype), v, acc * decay[:, None], PRECISION)


@triton.jit
def _weights(logits, peak, log_total):
    """exp(logit - peak - log_total), the softmax's weights. The three broadcast.

    Peaks are rounded as in `_accumulate`, so that their errors cancel.
    """
    return tl.exp2(tl.fma(logits, _LOG2E, -(peak * _LOG2E)) - log_total * _LOG2E)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def forward_kernel(
        q_ptr, k_ptr, v_ptr, ak_ptr, av_ptr, bias_ptr, padding_ptr, out_ptr, peak_ptr, log_total_ptr,
        q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
        ak_b, ak_m, ak_h, av_b, av_m, av_h, bias_h, bias_q,
        B, h, H, W, tiles_y, tiles_x, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """A block of a tile's queries against the additional keys and the tile's keys -> out, peak, log_total.

    Rows of the bias table are the queries of a tile, columns its keys, -inf where these are not in the same window.
    """
    ROWS: tl.constexpr = TILE_ROWS + 2 * ROW_MARGIN
    COLS: tl.constexpr = TILE_COLS + 2 * COL_MARGIN
    Q_BLOCKS: tl.constexpr = (TILE_ROWS * TILE_COLS + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    batch, head, tile = _locate(program // Q_BLOCKS, tiles_y * tiles_x, B, h, HAS_BIAS)
    row0, col0 = tile // tiles_x * TILE_ROWS, tile % tiles_x * TILE_COLS
    q_index, q_row, q_col, q_valid = _query_block(program % Q_BLOCKS, TILE_ROWS, TILE_COLS, BLOCK_Q)
    q_valid = q_valid & _on_grid(row0 + q_row, col0 + q_col, H, W)
    q_ptr += _corner(batch, head, row0, col0, q_b, q_y, q_x, q_h)
    q = _load_rows(q_ptr, q_row * q_y + q_col * q_x, q_valid, HEAD_DIM, D)  # (BLOCK_Q, D)

    peak = tl.full((BLOCK_Q,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    if M > 0:
        ak_ptr += batch.to(tl.int64) * ak_b + head.to(tl.int64) * ak_h
        av_ptr += batch.to(tl.int64) * av_b + head.to(tl.int64) * av_h
        for start in range(0, M, BLOCK_M):
            m_index = start + tl.arange(0, BLOCK_M)
            k, v = _load_additional(ak_ptr, av_ptr, m_index, ak_m, av_m, M, HEAD_DIM, D)
            logits = tl.where((m_index < M)[None, :], _dot_logits(q, k, scale, PRECISION), float('-inf'))
            peak, total, acc = _accumulate(logits, v, peak, total, acc, PRECISION)

    k_ptr += _corner(batch, head, row0, col0, k_b, k_y, k_x, k_h)
    v_ptr += _corner(batch, head, row0, col0, v_b, v_y, v_x, v_h)
    bias_ptr += head * bias_h
    if HAS_PADDING:
        padding_ptr += _map_corner(batch, 0, row0, col0, 1, H, W)
    first, last = _range_on_grid(row0 - ROW_MARGIN, H, ROWS, COLS, BLOCK_K)
    is_interior = _is_interior(row0, col0, H, W, ROW_MARGIN, COL_MARGIN, ROWS, COLS, BLOCK_K)
    # two loops are compiled, of which a program runs one; unlike those of if and else they share buffers
    for EDGE in tl.static_range(2):
        if is_interior == (EDGE == 0):
            for start in range(first, last, BLOCK_K):
                logits, k, v = _window_block(
                    start, q, k_ptr, v_ptr, bias_ptr, padding_ptr, bias_q, q_index, q_row, q_col, row0, col0,
                    k_y, k_x, v_y, v_x, H, W, scale, HEAD_DIM, D, WINDOW_ROWS, WINDOW_COLS, ROW_MARGIN, COL_MARGIN,
                    TILE_ROWS * TILE_COLS, ROWS, COLS, HAS_BIAS, HAS_PADDING, PRECISION, BLOCK_K, EDGE == 0)
                peak, total, acc = _accumulate(logits, v, peak, total, acc, PRECISION)

    if HAS_PADDING:
        has_none = peak == float('-inf')
        peak, total = tl.where(has_none, 0., peak), tl.where(has_none, 1., total)
    out_ptr += _token_corner(batch, head, row0, col0, h, H, W) * HEAD_DIM
    _store_rows(out_ptr, (q_row * W + q_col) * (h * HEAD_DIM), acc / total[:, None], q_valid, HEAD_DIM, D)
    map_offset = _map_corner(batch, head, row0, col0, h, H, W) + q_row * W + q_col
    tl.store(peak_ptr + map_offset, peak, mask=q_valid)
    tl.store(log_total_ptr + map_offset, tl.log(total), mask=q_valid)


@triton.jit
def _accumulate_query_gradient(logits, k, v, dout, peak, log_total, delta, scale, dq, PRECISION: tl.constexpr):
    weights = _weights(logits, peak[:, None], log_total[:, None])
    dweights = _dot(dout, tl.trans(v), tl.zeros(logits.shape, tl.float32), PRECISION)
    # scaled before it is rounded: without the scale it would leave the range of float16 sooner
    dlogits = weights * (dweights - delta[:, None]) * scale
    return _dot(dlogits.to(k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def query_gradient_kernel(
        q_ptr, k_ptr, v_ptr, ak_ptr, av_ptr, bias_ptr, padding_ptr, out_ptr, peak_ptr, log_total_ptr, dout_ptr,
        delta_ptr, dq_ptr,
        q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
        ak_b, ak_m, ak_h, av_b, av_m, av_h, bias_h, bias_q, dout_b, dout_y, dout_x, dout_h,
        B, h, H, W, tiles_y, tiles_x, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """The forward kernel's walk -> dq, and delta = sum(out * dout), which the other backward kernels need."""
    ROWS: tl.constexpr = TILE_ROWS + 2 * ROW_MARGIN
    COLS: tl.constexpr = TILE_COLS + 2 * COL_MARGIN
    Q_BLOCKS: tl.constexpr = (TILE_ROWS * TILE_COLS + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    batch, head, tile = _locate(program // Q_BLOCKS, tiles_y * tiles_x, B, h, HAS_BIAS)
    row0, col0 = tile // tiles_x * TILE_ROWS, tile % tiles_x * TILE_COLS
    q_index, q_row, q_col, q_valid = _query_block(program % Q_BLOCKS, TILE_ROWS, TILE_COLS, BLOCK_Q)
    q_valid = q_valid & _on_grid(row0 + q_row, col0 + q_col, H, W)
    q_ptr += _corner(batch, head, row0, col0, q_b, q_y, q_x, q_h)
    q = _load_rows(q_ptr, q_row * q_y + q_col * q_x, q_valid, HEAD_DIM, D)  # (BLOCK_Q, D)
    dout_ptr += _corner(batch, head, row0, col0, dout_b, dout_y, dout_x, dout_h)
    dout = _load_rows(dout_ptr, q_row * dout_y + q_col * dout_x, q_valid, HEAD_DIM, D)
    corner = _token_corner(batch, head, row0, col0, h, H, W) * HEAD_DIM
    offset = (q_row * W + q_col) * (h * HEAD_DIM)
    out = _load_rows(out_ptr + corner, offset, q_valid, HEAD_DIM, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    map_offset = _map_corner(batch, head, row0, col0, h, H, W) + q_row * W + q_col
    tl.store(delta_ptr + map_offset, delta, mask=q_valid)
    peak = tl.load(peak_ptr + map_offset, mask=q_valid, other=0.)
    log_total = tl.load(log_total_ptr + map_offset, mask=q_valid, other=0.)

    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    if M > 0:
        ak_ptr += batch.to(tl.int64) * ak_b + head.to(tl.int64) * ak_h
        av_ptr += batch.to(tl.int64) * av_b + head.to(tl.int64) * av_h
        for start in range(0, M, BLOCK_M):
            m_index = start + tl.arange(0, BLOCK_M)
            k, v = _load_additional(ak_ptr, av_ptr, m_index, ak_m, av_m, M, HEAD_DIM, D)
            logits = tl.where((m_index < M)[None, :], _dot_logits(q, k, scale, PRECISION), float('-inf'))
            dq = _accumulate_query_gradient(logits, k, v, dout, peak, log_total, delta, scale, dq, PRECISION)

    k_ptr += _corner(batch, head, row0, col0, k_b, k_y, k_x, k_h)
    v_ptr += _corner(batch, head, row0, col0, v_b, v_y, v_x, v_h)
    bias_ptr += head * bias_h
    if HAS_PADDING:
        padding_ptr += _map_corner(batch, 0, row0, col0, 1, H, W)
    first, last = _range_on_grid(row0 - ROW_MARGIN, H, ROWS, COLS, BLOCK_K)
    is_interior = _is_interior(row0, col0, H, W, ROW_MARGIN, COL_MARGIN, ROWS, COLS, BLOCK_K)
    # two loops are compiled, of which a program runs one; unlike those of if and else they share buffers
    for EDGE in tl.static_range(2):
        if is_interior == (EDGE == 0):
            for start in range(first, last, BLOCK_K):
                logits, k, v = _window_block(
                    start, q, k_ptr, v_ptr, bias_ptr, padding_ptr, bias_q, q_index, q_row, q_col, row0, col0,
                    k_y, k_x, v_y, v_x, H, W, scale, HEAD_DIM, D, WINDOW_ROWS, WINDOW_COLS, ROW_MARGIN, COL_MARGIN,
                    TILE_ROWS * TILE_COLS, ROWS, COLS, HAS_BIAS, HAS_PADDING, PRECISION, BLOCK_K, EDGE == 0)
                dq = _accumulate_query_gradient(logits, k, v, dout, peak, log_total, delta, scale, dq, PRECISION)
    _store_rows(dq_ptr + corner, offset, dq, q_valid, HEAD_DIM, D)


@triton.jit
def _load_queries(
        q_ptr, dout_ptr, peak_ptr, log_total_ptr, delta_ptr, batch, head, row0, col0, q_row, q_col, q_valid,
        q_b, q_y, q_x, q_h, dout_b, dout_y, dout_x, dout_h, h, H, W,
        HEAD_DIM: tl.constexpr, D: tl.constexpr,
):
    """What backward kernels read of n queries: q, dout (n, D), peak, log_total, delta (n,). Zeros where not valid."""
    q_ptr += _corner(batch, head, row0, col0, q_b, q_y, q_x, q_h)
    q = _load_rows(q_ptr, q_row * q_y + q_col * q_x, q_valid, HEAD_DIM, D)
    dout_ptr += _corner(batch, head, row0, col0, dout_b, dout_y, dout_x, dout_h)
    dout = _load_rows(dout_ptr, q_row * dout_y + q_col * dout_x, q_valid, HEAD_DIM, D)
    offset = _map_corner(batch, head, row0, col0, h, H, W) + q_row * W + q_col
    peak = tl.load(peak_ptr + offset, mask=q_valid, other=0.)
    log_total = tl.load(log_total_ptr + offset, mask=q_valid, other=0.)
    delta = tl.load(delta_ptr + offset, mask=q_valid, other=0.)
    return q, dout, peak, log_total, delta


@triton.jit
def _accumulate_key_gradient(logits, q, v, dout, peak, log_total, delta, scale, dk, dv, PRECISION: tl.constexpr):
    """Keys are rows here, queries columns."""
    # no weight is more than 1 but those of queries outside the grid, which a large bias must not make infinite: their
    # other factors are zeros. To mask them would take registers for every column.
    exponents = tl.fma(logits, _LOG2E, -(peak * _LOG2E)[None, :]) - (log_total * _LOG2E)[None, :]
    weights = tl.exp2(tl.minimum(exponents, 0., propagate_nan=tl.PropagateNan.ALL))
    dv = _dot(weights.to(dout.dtype), dout, dv, PRECISION)
    dweights = _dot(v, tl.trans(dout), tl.zeros(logits.shape, tl.float32), PRECISION)
    dlogits = weights * (dweights - delta[None, :]) * scale
    return _dot(dlogits.to(q.dtype), q, dk, PRECISION), dv


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def key_gradient_kernel(
        q_ptr, k_ptr, v_ptr, bias_ptr, padding_ptr, peak_ptr, log_total_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
        q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
        bias_h, bias_k, dout_b, dout_y, dout_x, dout_h,
        B, h, H, W, tiles_y, tiles_x, offset_y, offset_x, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr,
        WINDOW_ROWS: tl.constexpr, WINDOW_COLS: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A block of a tile's keys against all queries whose windows have them -> dk, dv, in (B, H, W, 2, h, d).

    Rows of the bias table are keys here: those of a window, (h, K, Q), if there is one window per tile, else those of
    a tile, and its columns the queries around the tile. Tiles begin offset_y rows and offset_x columns before the
    grid's corner: the margin, or 0 along an axis of a single window, whose keys one tile holds. Tiles of a margin
    without a token of the grid are left out.
    """
    TILE: tl.constexpr = TILE_ROWS * TILE_COLS
    SINGLE: tl.constexpr = TILE == WINDOW_ROWS * WINDOW_COLS
    KEY_ROWS: tl.constexpr = WINDOW_ROWS + 2 * ROW_MARGIN
    KEY_COLS: tl.constexpr = WINDOW_COLS + 2 * COL_MARGIN
    K_BLOCKS: tl.constexpr = (TILE + BLOCK_K - 1) // BLOCK_K
    # windows before the tile's own whose keys reach into it
    ROWS_BEFORE: tl.constexpr = (2 * ROW_MARGIN + WINDOW_ROWS - 1) // WINDOW_ROWS
    COLS_BEFORE: tl.constexpr = (2 * COL_MARGIN + WINDOW_COLS - 1) // WINDOW_COLS
    program = tl.program_id(0)
    batch, head, tile = _locate(program // K_BLOCKS, tiles_y * tiles_x, B, h, HAS_BIAS)
    tile_y, tile_x = tile // tiles_x + offset_y // TILE_ROWS, tile % tiles_x + offset_x // TILE_COLS
    row0, col0 = tile_y * TILE_ROWS - offset_y, tile_x * TILE_COLS - offset_x

    k_index = program % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    k_row, k_col = k_index // TILE_COLS, k_index % TILE_COLS
    k_valid = (k_index < TILE) & _on_grid(row0 + k_row, col0 + k_col, H, W)
    k_ptr += _corner(batch, head, row0, col0, k_b, k_y, k_x, k_h)
    v_ptr += _corner(batch, head, row0, col0, v_b, v_y, v_x, v_h)
    k = _load_rows(k_ptr, k_row * k_y + k_col * k_x, k_valid, HEAD_DIM, D)  # (BLOCK_K, D)
    v = _load_rows(v_ptr, k_row * v_y + k_col * v_x, k_valid, HEAD_DIM, D)

    bias_ptr += head * bias_h
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    if SINGLE:
        # window by window: the numbers of the keys in it do not depend on the query then
        Q_BLOCKS: tl.constexpr = (TILE + BLOCK_Q - 1) // BLOCK_Q
        first_y, first_x = tl.maximum(tile_y - ROWS_BEFORE, 0), tl.maximum(tile_x - COLS_BEFORE, 0)
        windows_y = tl.minimum(tile_y, (H - 1) // WINDOW_ROWS) - first_y + 1
        windows_x = tl.minimum(tile_x, (W - 1) // WINDOW_COLS) - first_x + 1
        for step in range(0, windows_y * windows_x * Q_BLOCKS):
            window = step // Q_BLOCKS
            if COLS_BEFORE <= 1:  # one or two windows in a row, no division
                window_y, window_x = window >> (windows_x - 1), window & (windows_x - 1)
            else:
                window_y, window_x = window // windows_x, window % windows_x
            window_row, window_col = (first_y + window_y) * WINDOW_ROWS, (first_x + window_x) * WINDOW_COLS
            q_index, q_row, q_col, q_valid = _query_block(step % Q_BLOCKS, WINDOW_ROWS, WINDOW_COLS, BLOCK_Q)
            q_valid = q_valid & _on_grid(window_row + q_row, window_col + q_col, H, W)
            q, dout, peak, log_total, delta = _load_queries(
                q_ptr, dout_ptr, peak_ptr, log_total_ptr, delta_ptr, batch, head, window_row, window_col,
                q_row, q_col, q_valid,
                q_b, q_y, q_x, q_h, dout_b, dout_y, dout_x, dout_h, h, H, W, HEAD_DIM, D)
            logits = _dot_logits(k, q, scale, PRECISION)
            key_row, key_col = row0 - window_row + k_row + ROW_MARGIN, col0 - window_col + k_col + COL_MARGIN
            in_window = (key_row < KEY_ROWS) & (key_col < KEY_COLS) & (k_index < TILE)
            if HAS_BIAS:
                number = tl.where(in_window, key_row * KEY_COLS + key_col, KEY_ROWS * KEY_COLS)
                logits += _load_bias(bias_ptr, bias_k, number, q_index, KEY_ROWS * KEY_COLS, TILE)
            logits = tl.where(in_window[:, None], logits, float('-inf'))
            dk, dv = _accumulate_key_gradient(logits, q, v, dout, peak, log_total, delta, scale, dk, dv, PRECISION)
    else:
        # all queries around the tile row by row, from the first window before it; pairs are masked
        ROWS: tl.constexpr = TILE_ROWS + ROWS_BEFORE * WINDOW_ROWS
        COLS: tl.constexpr = TILE_COLS + COLS_BEFORE * WINDOW_COLS
        q_row0 = tile_y * TILE_ROWS - ROWS_BEFORE * WINDOW_ROWS
        q_col0 = tile_x * TILE_COLS - COLS_BEFORE * WINDOW_COLS
        first, last = _range_on_grid(q_row0, H, ROWS, COLS, BLOCK_Q)
        for start in range(first, last, BLOCK_Q):
            q_index = start + tl.arange(0, BLOCK_Q)
            q_row = _divide(q_index, COLS)
            q_col = q_index - q_row * COLS
            q_valid = (q_index < ROWS * COLS) & _on_grid(q_row0 + q_row, q_col0 + q_col, H, W)
            q, dout, peak, log_total, delta = _load_queries(
                q_ptr, dout_ptr, peak_ptr, log_total_ptr, delta_ptr, batch, head, q_row0, q_col0, q_row, q_col, q_valid,
                q_b, q_y, q_x, q_h, dout_b, dout_y, dout_x, dout_h, h, H, W, HEAD_DIM, D)
            logits = _dot_logits(k, q, scale, PRECISION)
            if HAS_BIAS:
                logits += _load_bias(bias_ptr, bias_k, k_index, q_index, TILE, ROWS * COLS)
            else:
                in_window = _in_window(
                    q_row[None, :], q_col[None, :], (k_row + (row0 - q_row0))[:, None],
                    (k_col + (col0 - q_col0))[:, None], WINDOW_ROWS, WINDOW_COLS, ROW_MARGIN, COL_MARGIN)
                logits = tl.where(in_window, logits, float('-inf'))
            dk, dv = _accumulate_key_gradient(logits, q, v, dout, peak, log_total, delta, scale, dk, dv, PRECISION)

    if HAS_PADDING:  # after the walk, in which the weights of padding are finite
        padding_ptr += _map_corner(batch, 0, row0, col0, 1, H, W)
        is_key = tl.load(padding_ptr + k_row * W + k_col, mask=k_valid, other=1) == 0
        dk, dv = tl.where(is_key[:, None], dk, 0.), tl.where(is_key[:, None], dv, 0.)
    # gradients of keys and values lie side by side, as if they were of twice as many heads
    token = _token_corner(batch, head, row0, col0, 2 * h, H, W) * HEAD_DIM
    token_offset = (k_row * W + k_col) * (2 * h * HEAD_DIM)
    _store_rows(dk_ptr + token, token_offset, dk, k_valid, HEAD_DIM, D)
    _store_rows(dv_ptr + token, token_offset, dv, k_valid, HEAD_DIM, D)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def additional_gradient_kernel(
        q_ptr, ak_ptr, av_ptr, peak_ptr, log_total_ptr, dout_ptr, delta_ptr, dak_ptr, dav_ptr,
        q_b, q_y, q_x, q_h, ak_b, ak_m, ak_h, av_b, av_m, av_h, dout_b, dout_y, dout_x, dout_h,
        B, h, H, W, splits, chunk, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS_M: tl.constexpr,
):
    """A block of additional keys against `chunk` queries of an image -> part of dk, dv, (splits, B, M, 2, h, d)."""
    M_BLOCKS: tl.constexpr = (M + ROWS_M - 1) // ROWS_M
    program = tl.program_id(0)
    batch, head, split = _locate(program // M_BLOCKS, splits, B, h, False)
    m_index = program % M_BLOCKS * ROWS_M + tl.arange(0, ROWS_M)
    ak_ptr += batch.to(tl.int64) * ak_b + head.to(tl.int64) * ak_h
    av_ptr += batch.to(tl.int64) * av_b + head.to(tl.int64) * av_h
    k, v = _load_additional(ak_ptr, av_ptr, m_index, ak_m, av_m, M, HEAD_DIM, D)  # (ROWS_M, D)

    dk = tl.zeros((ROWS_M, D), tl.float32)
    dv = tl.zeros((ROWS_M, D), tl.float32)
    end = tl.minimum((split + 1) * chunk, H * W)
    for start in range(split * chunk, end, BLOCK_Q):
        token = start + tl.arange(0, BLOCK_Q)
        # counted from the block's first token, which keeps offsets small
        row0, col0 = start // W, start % W
        q_row, q_col = token // W - row0, token % W - col0
        q, dout, peak, log_total, delta = _load_queries(
            q_ptr, dout_ptr, peak_ptr, log_total_ptr, delta_ptr, batch, head, row0, col0, q_row, q_col, token < end,
            q_b, q_y, q_x, q_h, dout_b, dout_y, dout_x, dout_h, h, H, W, HEAD_DIM, D)
        logits = _dot_logits(k, q, scale, PRECISION)
        dk, dv = _accumulate_key_gradient(logits, q, v, dout, peak, log_total, delta, scale, dk, dv, PRECISION)

    row = (split.to(tl.int64) * B + batch) * M * 2 * h + head
    _store_rows(dak_ptr + row * HEAD_DIM, m_index * 2 * h * HEAD_DIM, dk, m_index < M, HEAD_DIM, D)
    _store_rows(dav_ptr + row * HEAD_DIM, m_index * 2 * h * HEAD_DIM, dv, m_index < M, HEAD_DIM, D)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def bias_gradient_kernel(
        q_ptr, k_ptr, v_ptr, bias_ptr, padding_ptr, peak_ptr, log_total_ptr, dout_ptr, delta_ptr, dbias_ptr,
        q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
        bias_h, bias_q, dout_b, dout_y, dout_x, dout_h,
        B, h, H, W, tiles_y, tiles_x, groups, scale,
        HEAD_DIM: tl.constexpr, D: tl.constexpr, ROW_MARGIN: tl.constexpr, COL_MARGIN: tl.constexpr,
        TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, HAS_PADDING: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A block of a tile's queries against a block of its keys, summed over a group of the batch's tiles.

    The sum over tiles stays in registers. -> (groups, h, queries of a tile, keys of a tile), both in whole blocks.
    """
    ROWS: tl.constexpr = TILE_ROWS + 2 * ROW_MARGIN
    COLS: tl.constexpr = TILE_COLS + 2 * COL_MARGIN
    Q_BLOCKS: tl.constexpr = (TILE_ROWS * TILE_COLS + BLOCK_Q - 1) // BLOCK_Q
    K_BLOCKS: tl.constexpr = (ROWS * COLS + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    q_block, k_block = program // K_BLOCKS % Q_BLOCKS, program % K_BLOCKS
    program = program // (Q_BLOCKS * K_BLOCKS)
    group, head = program % groups, program // groups

    q_index, q_row, q_col, q_valid = _query_block(q_block, TILE_ROWS, TILE_COLS, BLOCK_Q)
    k_index = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    bias = _load_bias(bias_ptr + head * bias_h, bias_q, q_index, k_index, TILE_ROWS * TILE_COLS, ROWS * COLS)
    dbias = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for tile in range(group, B * tiles_y * tiles_x, groups):
        batch = tile // (tiles_y * tiles_x)
        tile_y = (tile - batch * (tiles_y * tiles_x)) // tiles_x
        row0, col0 = tile_y * TILE_ROWS, (tile - (batch * tiles_y + tile_y) * tiles_x) * TILE_COLS
        q_inside = q_valid & _on_grid(row0 + q_row, col0 + q_col, H, W)
        q, dout, peak, log_total, delta = _load_queries(
            q_ptr, dout_ptr, peak_ptr, log_total_ptr, delta_ptr, batch, head, row0, col0, q_row, q_col, q_inside,
            q_b, q_y, q_x, q_h, dout_b, dout_y, dout_x, dout_h, h, H, W, HEAD_DIM, D)
        k_corner = _corner(batch, head, row0, col0, k_b, k_y, k_x, k_h)
        v_corner = _corner(batch, head, row0, col0, v_b, v_y, v_x, v_h)
        padding_corner = _map_corner(batch, 0, row0, col0, 1, H, W)
        k, v, _, _, k_inside = _load_window_keys(
            k_ptr + k_corner, v_ptr + v_corner, padding_ptr + padding_corner, k_index, row0, col0, k_y, k_x, v_y, v_x,
            H, W, HEAD_DIM, D, ROW_MARGIN, COL_MARGIN, ROWS, COLS, HAS_PADDING, False)
        logits = tl.where(k_inside[None, :], _dot_logits(q, k, scale, PRECISION) + bias, float('-inf'))
        # what the bias makes of queries outside the grid must not be infinite, as it is multiplied by zeros
        peak = tl.where(q_inside, peak, float('inf'))
        weights = _weights(logits, peak[:, None], log_total[:, None])
        dweights = _dot(dout, tl.trans(v), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION)
        dbias += weights * (dweights - delta[:, None])

    row = (group.to(tl.int64) * h + head) * (Q_BLOCKS * BLOCK_Q) + q_index
    tl.store(dbias_ptr + row[:, None] * (K_BLOCKS * BLOCK_K) + k_index[None, :], dbias)
