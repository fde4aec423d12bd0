"""Launches the fused kernels of long-short attention: tiles, block shapes, bias tables, buffers.

Shapes: B batch, H x W grid, h heads, d head width, M additional keys; Q queries and K keys of a window.

Triton is imported on first use: there are builds of PyTorch without it.
"""
import contextlib
import functools
import importlib
import importlib.util
import math
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import allows_tf32
from ...window import Window, key_size
from ..blocked import blocked_backward
from . import tuning

# Tokens on a side of a tile and in all of it, unless one window is larger.
_TILE_SIDE = 8
_TILE_TOKENS = 64
# The kernels divide a token's number by the columns of a rectangle exactly up to this product of both. In so many rows
# a factor of the division has 32 bits.
_DIVISION_LIMIT = 2 ** 20
_LARGEST_ROWS = 1024
# The last block of a rectangle's tokens reaches over it by less than the largest block.
_LARGEST_BLOCK = 256
# Block shapes are chosen for head widths up to this.
_LARGEST_HEAD = 128
# Rows of bias tables are padded to a multiple of this, which kernels rely on to read whole vectors.
_TABLE_ROW = 16
# Gradients that many programs add to are summed in two steps. The first takes about as many programs as fill a large
# GPU a few times, which bounds the partial sums; each has at least some blocks to add up.
_REDUCTION_PROGRAMS = 1024
_REDUCTION_STEPS = 4

# Compile-time arguments that the choice of a block shape depends on.
_CHOICE = (
    'HEAD_DIM', 'WINDOW_ROWS', 'WINDOW_COLS', 'ROW_MARGIN', 'COL_MARGIN', 'M', 'HAS_BIAS', 'HAS_PADDING', 'R', 'KINDS',
    'PRECISION')

Arguments = Dict[str, Any]
Gradients = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]


class Blocks(NamedTuple):
    """Block shape of a kernel, and how to compile it."""
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    # the most per thread; by default the assembler decides, and may spill a few to fit one more block of threads
    registers: Optional[int] = None


# Of the kernels of the long-range half, which own 16 rows and walk over blocks of tokens; see there.
_LONG_RANGE_BLOCKS: Dict[str, Dict[int, List[Blocks]]] = {
    'summaries': {64: [Blocks(16, 64, 4, 3)], 128: [Blocks(16, 64, 4, 2)]},
    'summaries_gradient': {64: [Blocks(16, 64, 4, 2)], 128: [Blocks(16, 64, 8, 2)]},
    'global_attention': {64: [Blocks(16, 64, 4, 3)], 128: [Blocks(16, 64, 4, 2)]},
    'global_gradient': {64: [Blocks(16, 64, 4, 2)], 128: [Blocks(16, 32, 4, 2)]},
    'merge': {128: [Blocks(16, 16, 1, 1)]},
}
# By kernel and head width up to which they serve, for operands of 16 bits. The first is the default, the others are
# alternatives to time; those of the additional keys' and the bias's gradient have equal shapes, for the buffers of
# partial sums depend on them. None of them spills registers, but for one that spills 16 bytes with a mask of padding:
# tests/ops/test_triton.py compiles them.
_HOPPER_BLOCKS: Dict[str, Dict[int, List[Blocks]]] = {
    'forward': {
        64: [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3)],
        128: [Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)],
    },
    'query_gradient': {
        64: [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3)],
        128: [Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)],
    },
    'key_gradient': {
        64: [Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 3), Blocks(64, 64, 8, 2)],
        128: [Blocks(32, 64, 8, 2)],
    },
    'additional_gradient': {64: [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3)], 128: [Blocks(32, 64, 8, 2)]},
    'bias_gradient': {64: [Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 3)], 128: [Blocks(64, 64, 8, 2)]},
    **_LONG_RANGE_BLOCKS,
}
_AMPERE_BLOCKS: Dict[str, Dict[int, List[Blocks]]] = {
    'forward': {
        16: [Blocks(64, 32, 4, 3)],
        32: [Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 3, 128)],
        64: [Blocks(64, 32, 4, 3)],
        128: [Blocks(32, 64, 8, 2)],
    },
    'query_gradient': {
        32: [Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 3)],
        64: [Blocks(64, 32, 4, 2)],
        128: [Blocks(32, 64, 8, 2)],
    },
    'key_gradient': {64: [Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 3)], 128: [Blocks(32, 64, 8, 2)]},
    'additional_gradient': {64: [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3)], 128: [Blocks(32, 64, 8, 2)]},
    'bias_gradient': {64: [Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 3)], 128: [Blocks(32, 64, 8, 2)]},
    **_LONG_RANGE_BLOCKS,
}
# A multiprocessor of compute capability 8.6, 8.9 or 12.0 has 100 KiB of shared memory, in which several blocks of
# threads should fit.
_SMALL_BLOCKS: Dict[str, Dict[int, List[Blocks]]] = {
    **_AMPERE_BLOCKS,
    'forward': {64: [Blocks(64, 32, 4, 2)], 128: [Blocks(32, 32, 4, 2)]},
    'query_gradient': {64: [Blocks(64, 32, 4, 2)], 128: [Blocks(32, 32, 8, 2)]},
}
# float32 is multiplied without tensor cores, in full precision
_FLOAT32_BLOCKS: Dict[str, Dict[int, List[Blocks]]] = {
    'forward': {
        32: [Blocks(64, 32, 8, 2, 255)],
        63: [Blocks(64, 32, 16, 2, 128)],  # masks of the unused channels take registers
        64: [Blocks(32, 32, 8, 2, 255)],
        128: [Blocks(32, 32, 16, 2, 128)],
    },
    'query_gradient': {
        32: [Blocks(64, 32, 8, 2, 255)],
        64: [Blocks(32, 32, 8, 2, 255)],
        128: [Blocks(16, 32, 8, 2, 255)],
    },
    'key_gradient': {64: [Blocks(32, 32, 8, 2, 255)], 128: [Blocks(16, 32, 8, 1, 255)]},
    'additional_gradient': {64: [Blocks(32, 32, 8, 2, 255)], 128: [Blocks(32, 32, 16, 2, 128)]},
    'bias_gradient': {64: [Blocks(32, 32, 8, 2, 255)], 128: [Blocks(16, 32, 16, 2, 128)]},
    'summaries': {64: [Blocks(16, 32, 8, 2, 255)], 128: [Blocks(16, 16, 8, 1, 255)]},
    'summaries_gradient': {64: [Blocks(16, 32, 4, 2)], 128: [Blocks(16, 16, 8, 1, 255)]},
    'global_attention': {64: [Blocks(16, 32, 8, 2, 255)], 128: [Blocks(16, 16, 8, 1, 255)]},
    'global_gradient': {64: [Blocks(16, 16, 8, 1, 255)], 128: [Blocks(16, 16, 8, 1, 255)]},
    'merge': {128: [Blocks(16, 16, 1, 1)]},
}
# the interpreter takes the same time for a block of any size
_INTERPRETER_BLOCKS = Blocks(128, 256, 4, 1)


def why_not(query: Tensor, window: Window, with_grad: bool, with_lse: bool) -> Optional[str]:
    """The reason why the kernels can't compute this here, None where they can."""
    return no_platform(query.device, query.dtype) or _no_size(query, window)


@torch.compiler.assume_constant_result  # compilation need not follow imports and questions to the driver
def no_platform(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    return _no_triton() or _no_device(device, dtype)


@functools.cache
def _no_triton() -> Optional[str]:
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed'
    try:
        importlib.import_module('triton')
    except Exception as e:  # whatever a broken installation raises
        return f'the package triton does not import ({type(e).__name__}: {e})'
    return None


def _no_device(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'the kernels take tensors of 16 or 32 bits, the query has {dtype}'
    if _interpreting():
        return None
    if torch.version.cuda is None or device.type != 'cuda':
        return f'the kernels take CUDA tensors, the query is on {device.type}'
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f'the kernels need compute capability 8.0 or more, {device} has {capability[0]}.{capability[1]}'
    return None


def _no_size(query: Tensor, window: Window) -> Optional[str]:
    _, _, W, h, d = query.shape
    if _no_window(window):
        return _no_window(window)
    if no_head(d):
        return no_head(d)
    rows = _rows_of_tile(window)
    if rows * 3 * W * h * d >= 2 ** 31:
        return f'{rows} rows of queries, keys and values must span less than 2^31 elements, not {rows * 3 * W * h * d}'
    return None


def _no_window(window: Window) -> Optional[str]:
    for rows, cols in (_keys_around_tile(window), _queries_around_tile(window)):
        if rows > _LARGEST_ROWS or (rows * cols + _LARGEST_BLOCK) * cols > _DIVISION_LIMIT:
            return (
                f'the kernels number the tokens around a window, and {rows} x {cols} of them are too many, for '
                f'{tuple(window)}: rows may be up to {_LARGEST_ROWS} and (rows * columns + {_LARGEST_BLOCK}) * columns '
                f'up to {_DIVISION_LIMIT}')
    return None


def no_head(head_dim: int) -> Optional[str]:
    """The reason why no kernel takes heads of that width, None where they do."""
    if head_dim > _LARGEST_HEAD:
        return f'the kernels take head widths of up to {_LARGEST_HEAD}, not {head_dim}'
    return None


def tile_size(window: Window) -> Tuple[int, int]:
    """Rows and columns of a tile: as many windows as fit, 8 x 8, 4 x 4, 2 x 2, 2 x 2 for w = 1, 2, 3, 4, else one.

    A tile of windows of one row, such as those of sequences, is a row itself.
    """
    rows, cols, *_ = window
    if rows == 1 and cols > 1:
        most_rows, most_cols = 1, _TILE_TOKENS
    else:
        most_rows, most_cols = min(_TILE_SIDE, _TILE_TOKENS // cols), min(_TILE_SIDE, _TILE_TOKENS // rows)
    return max(most_rows // rows, 1) * rows, max(most_cols // cols, 1) * cols


def windows_before(window: Window) -> Tuple[int, int]:
    """How many windows before a tile of keys, along each axis, reach into it; the tile begins a margin before its own.
    """
    return ceil_div(2 * window.row_margin, window.rows), ceil_div(2 * window.col_margin, window.cols)


def _keys_around_tile(window: Window) -> Tuple[int, int]:
    """Rows and columns of all keys that a tile's queries see."""
    rows, cols = tile_size(window)
    return rows + 2 * window.row_margin, cols + 2 * window.col_margin


def _queries_around_tile(window: Window) -> Tuple[int, int]:
    """Rows and columns of all queries that see a tile's keys."""
    (rows, cols), before = tile_size(window), windows_before(window)
    return rows + before[0] * window.rows, cols + before[1] * window.cols


def _rows_of_tile(window: Window) -> int:
    """The most rows of the grid that a kernel counts offsets in, which are 32 bit."""
    return max(_keys_around_tile(window)[0], _queries_around_tile(window)[0], 64)


def block_shapes(kernel: str, head_dim: int, dtype: torch.dtype, capability: Tuple[int, int]) -> List[Blocks]:
    """Block shapes of a kernel that it may be launched with, the default first."""
    if dtype == torch.float32:
        table = _FLOAT32_BLOCKS
    else:
        small = capability in ((8, 6), (8, 9)) or capability[0] == 12
        table = _HOPPER_BLOCKS if capability[0] == 9 else _SMALL_BLOCKS if small else _AMPERE_BLOCKS
    return next(shapes for width, shapes in sorted(table[kernel].items()) if head_dim <= width)


def constants(
        head_dim: int,
        window: Window,
        num_additional: int,
        has_bias: bool,
        has_padding: bool,
        dtype: torch.dtype,
) -> Arguments:
    """Compile-time arguments of the kernels, but for block shapes."""
    tile_rows, tile_cols = tile_size(window)
    block_m = max(power_of_two(num_additional), 16)
    return dict(
        HEAD_DIM=head_dim,
        D=max(power_of_two(head_dim), 16),  # the least that tensor cores take
        WINDOW_ROWS=window.rows,
        WINDOW_COLS=window.cols,
        ROW_MARGIN=window.row_margin,
        COL_MARGIN=window.col_margin,
        TILE_ROWS=tile_rows,
        TILE_COLS=tile_cols,
        M=num_additional,
        # of the loop over additional keys, and of the kernel that owns some of them
        BLOCK_M=min(block_m, 32),
        ROWS_M=min(block_m, 32 if dtype == torch.float32 else 64),
        HAS_BIAS=has_bias,
        HAS_PADDING=has_padding,
        PRECISION='tf32' if dtype == torch.float32 and allows_tf32() else 'ieee',
    )


class _Poison(threading.local):
    active = False


_poison = _Poison()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """A block in which this thread's buffers begin as NaN, so that entries that no kernel writes are seen."""
    _poison.active = True
    try:
        yield
    finally:
        _poison.active = False


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result."""
    if _poison.active:
        return torch.full(tuple(shape), float('nan'), dtype=dtype, device=device)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def forward(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        with_lse: bool,
        padding: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """`ls_vision.ops.attention.attend`, which describes arguments and results.

    Returns:
        out: (B, H, W, h, d).
        statistics: (2, B, h, H, W) float32, the largest logit of each query and the logarithm of the sum of
            exponentials relative to it.
    """
    B, H, W, h, d = query.shape
    out = buffer((B, H, W, h, d), query.dtype, query.device)
    statistics = buffer((2, B, h, H, W), torch.float32, query.device)
    arguments = _arguments(query, pair, window, additional, bias, scale, padding)
    arguments.update(out_ptr=out, **_statistics(statistics), **_query_table(bias, window, query))
    tiles = B * h * arguments['tiles_y'] * arguments['tiles_x']
    launch('forward', tiles, arguments, query, BLOCK_Q=math.prod(tile_size(window)))
    return out, statistics


def backward(
        grad_out: Tensor,
        grad_lse: Optional[Tensor],
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        out: Tensor,
        statistics: Tensor,
        needs: Sequence[bool],
        padding: Optional[Tensor] = None,
) -> Gradients:
    """Gradients of `forward`, from its arguments and results, contiguous and in the dtypes of the inputs.

    No atomics: the same input gives the same bits, as long as block shapes stay the same. A gradient of the
    log-sum-exp, which the kernels don't know, is left to the portable backend.

    Returns:
        Gradients of query, pair, additional and bias, None for those that are None or that nobody needs.
    """
    if grad_lse is not None:
        return blocked_backward(
            grad_out, grad_lse, query, pair, window, additional, bias, scale, out, statistics, needs, padding)
    B, H, W, h, _ = query.shape
    tile_rows, tile_cols = tile_size(window)
    arguments = _arguments(query, pair, window, additional, bias, scale, padding)
    delta = buffer((B, h, H, W), torch.float32, query.device)
    grad_query = buffer(query.shape, query.dtype, query.device)
    grad_pair = grad_additional = grad_bias = None
    arguments.update(out_ptr=out.contiguous(), delta_ptr=delta, **_statistics(statistics.contiguous()))
    arguments.update(**_token_arguments('dout', readable(grad_out, query.dtype)))
    query_table = _query_table(bias, window, query)
    tiles = B * h * arguments['tiles_y'] * arguments['tiles_x']

    # fills in delta for the others, so it comes first and is never left out
    launch(
        'query_gradient', tiles, {**arguments, **query_table, 'dq_ptr': grad_query}, query,
        BLOCK_Q=tile_rows * tile_cols)
    if needs[1]:
        grad_pair = buffer(pair.shape, pair.dtype, pair.device)
        dk, dv = grad_pair.unbind(3)
        # key tiles begin a margin before the grid, but where one window is all there is along an axis
        single = (tile_rows, tile_cols) == (window.rows, window.cols)
        offset_y = 0 if single and window.rows >= H else window.row_margin
        offset_x = 0 if single and window.cols >= W else window.col_margin
        tiles_y, tiles_x = _key_tiles(H, tile_rows, offset_y), _key_tiles(W, tile_cols, offset_x)
        own = dict(
            dk_ptr=dk, dv_ptr=dv, tiles_y=tiles_y, tiles_x=tiles_x, offset_y=offset_y, offset_x=offset_x,
            **_key_table(bias, window, query))
        launch(
            'key_gradient', B * h * tiles_y * tiles_x, {**arguments, **own}, query, BLOCK_K=tile_rows * tile_cols)
    if additional is not None and needs[2]:
        grad_additional = _additional_gradient(arguments, query, additional)
    if bias is not None and needs[3]:
        grad_bias = _bias_gradient({**arguments, **query_table}, query, window)
        grad_bias = grad_bias.to(bias.dtype).contiguous()
    return grad_query if needs[0] else None, grad_pair, grad_additional, grad_bias


def _key_tiles(length: int, size: int, margin: int) -> int:
    """Tiles of keys along an axis of `length` tokens: the first begins a margin before it; any before it do not count.
    """
    return ceil_div(length + margin, size) - margin // size


def _statistics(statistics: Tensor) -> Arguments:
    """Pointers to the halves of (2, B, h, H, W)."""
    return dict(peak_ptr=statistics[0], log_total_ptr=statistics[1])


def _additional_gradient(arguments: Arguments, query: Tensor, additional: Tensor) -> Tensor:
    """(B, M, 2, h, d)."""
    B, H, W, h, d = query.shape
    M = additional.shape[1]
    if M == 0:
        return torch.zeros_like(additional)
    block = _blocks('additional_gradient', query)[0].queries
    m_blocks = ceil_div(M, arguments['ROWS_M'])
    steps = max(ceil_div(ceil_div(H * W, block) * B * h * m_blocks, _REDUCTION_PROGRAMS), _REDUCTION_STEPS)
    splits = ceil_div(H * W, steps * block)
    parts = buffer((splits, B, M, 2, h, d), query.dtype if splits == 1 else torch.float32, query.device)
    own = dict(dak_ptr=parts[:, :, :, 0], dav_ptr=parts[:, :, :, 1], splits=splits, chunk=steps * block)
    launch('additional_gradient', B * h * splits * m_blocks, {**arguments, **own}, query)
    return sum_parts(parts, additional.dtype)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, of which a single part is the result already."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def _bias_gradient(arguments: Arguments, query: Tensor, window: Window) -> Tensor:
    B, h = query.shape[0], query.shape[3]
    queries, keys = math.prod(tile_size(window)), math.prod(_keys_around_tile(window))
    blocks = _blocks('bias_gradient', query)[0]
    q_blocks, k_blocks = ceil_div(queries, blocks.queries), ceil_div(keys, blocks.keys)
    pairs = h * q_blocks * k_blocks
    tiles = B * arguments['tiles_y'] * arguments['tiles_x']
    steps = max(ceil_div(tiles * pairs, _REDUCTION_PROGRAMS), _REDUCTION_STEPS)
    groups = ceil_div(tiles, steps)
    # float32 sums of a tile's queries and keys, in whole blocks
    shape = (groups, h, q_blocks * blocks.queries, k_blocks * blocks.keys)
    dbias = buffer(shape, torch.float32, query.device)
    launch('bias_gradient', pairs * groups, {**arguments, 'dbias_ptr': dbias, 'groups': groups}, query)
    total = sum_parts(dbias, torch.float32)
    return _fold_windows(total[:, :queries, :keys], window)


def _fold_windows(x: Tensor, window: Window) -> Tensor:
    """Sums the pairs of a tile, (h, queries, keys), over its windows -> (h, Q, K)."""
    rows, cols = tile_size(window)
    if (rows, cols) == window[:2]:
        return x
    key_rows, key_cols = key_size(window)
    x = x.unflatten(1, (rows, cols)).unflatten(3, _keys_around_tile(window))
    windows = [
        x[:, i:i + window.rows, j:j + window.cols, i:i + key_rows, j:j + key_cols].flatten(3).flatten(1, 2)
        for i in range(0, rows, window.rows)
        for j in range(0, cols, window.cols)
    ]
    return functools.reduce(torch.add, windows)


def _arguments(
        query: Tensor,
        pair: Tensor,
        window: Window,
        additional: Optional[Tensor],
        bias: Optional[Tensor],
        scale: float,
        padding: Optional[Tensor],
) -> Arguments:
    """What the kernels have in common, by the names of their parameters."""
    B, H, W, h, d = query.shape
    tile_rows, tile_cols = tile_size(window)
    M = 0 if additional is None else additional.shape[1]
    arguments: Arguments = dict(
        B=B, h=h, H=H, W=W, tiles_y=ceil_div(H, tile_rows), tiles_x=ceil_div(W, tile_cols), scale=scale)
    key, value = readable(pair, query.dtype).unbind(3)
    for name, x in (('q', readable(query, query.dtype)), ('k', key), ('v', value)):
        arguments.update(_token_arguments(name, x))
    # without additional keys the pointers are not used, but there must be some
    ak, av = (query, query) if additional is None else readable(additional, query.dtype).unbind(2)
    for name, x in (('ak', ak), ('av', av)):
        b, m, *_, head, _ = x.stride()
        arguments.update({f'{name}_ptr': x, f'{name}_b': b, f'{name}_m': m, f'{name}_h': head})
    arguments.update(constants(d, window, M, bias is not None, padding is not None, query.dtype))
    # without padding the pointer is not used, either
    arguments['padding_ptr'] = query if padding is None else padding.contiguous().view(torch.uint8)
    rows = _rows_of_tile(window)
    if rows * max(arguments['q_y'], arguments['k_y'], arguments['v_y'], 2 * W * h * d) >= 2 ** 31:
        raise ValueError(
            f'{rows} rows of a grid must span less than 2^31 elements, got shape {list(query.shape)} and strides '
            f'{query.stride()} of the query and {pair.stride()} of keys and values.')
    return arguments


def _token_arguments(name: str, x: Tensor) -> Arguments:
    """Pointer and strides of a (B, H, W, h, d) tensor."""
    return {f'{name}_ptr': x, **{f'{name}_{axis}': stride for axis, stride in zip('byxh', x.stride())}}


def _query_table(bias: Optional[Tensor], window: Window, query: Tensor) -> Arguments:
    """The bias for kernels whose rows are queries: those of a tile, columns are the keys in and around it.

    It is in the precision of the query, as the mask of PyTorch's attention is: kernels read it for every logit.
    """
    if bias is None:
        return dict(bias_ptr=query, bias_h=0, bias_q=0)
    if tile_size(window) != window[:2]:
        tile, margins = tile_size(window), window[2:]
        keys = [(-margin, size + margin) for size, margin in zip(tile, margins)]
        bias = _tile_bias(bias, window, [(0, size) for size in tile], keys)
    table = _aligned(bias.to(query.dtype))
    return dict(bias_ptr=table, bias_h=table.stride(0), bias_q=table.stride(1))


def _key_table(bias: Optional[Tensor], window: Window, query: Tensor) -> Arguments:
    """The bias for the kernel whose rows are keys; see there."""
    if bias is None:
        return dict(bias_ptr=query, bias_h=0, bias_k=0)
    if tile_size(window) != window[:2]:
        tile, sizes, margins = tile_size(window), window[:2], window[2:]
        queries = [(-before * size, end) for before, size, end in zip(windows_before(window), sizes, tile)]
        keys = [(-margin, size - margin) for size, margin in zip(tile, margins)]
        bias = _tile_bias(bias, window, queries, keys)
    table = _aligned(bias.to(query.dtype).transpose(1, 2))
    return dict(bias_ptr=table, bias_h=table.stride(0), bias_k=table.stride(1))


Span = Tuple[int, int]


def _tile_bias(bias: Tensor, window: Window, queries: Sequence[Span], keys: Sequence[Span]) -> Tensor:
    """The bias of all pairs of a rectangle of queries and one of keys, -inf where the key is not in the query's window.

    Args:
        bias: (h, Q, K).
        window: Window.
        queries: First and last (exclusive) row, and column, of n queries, counted from a window's corner.
        keys: The same of m keys.

    Returns:
        (h, n, m).
    """
    axes = zip(window[:2], window[2:], queries, keys)
    rows, cols = (_axis_pairs(*axis, bias.device) for axis in axes)
    number = (rows[0][:, None] * window.cols + cols[0]).reshape(-1, 1)  # (n, 1)
    position = rows[1][:, None, :, None] * key_size(window)[1] + cols[1][:, None, :]  # (rows, columns, rows, columns)
    inside = rows[2][:, None, :, None] & cols[2][:, None, :]
    position, inside = (x.flatten(2).flatten(0, 1) for x in (position, inside))  # (n, m)
    return bias[:, number, position].masked_fill(~inside, float('-inf'))


def _axis_pairs(size: int, margin: int, queries: Span, keys: Span, device: torch.device) -> Tuple[Tensor, ...]:
    """Along one axis, of n queries and m keys: the query's number in its window, (n,), the key's, is it one, (n, m)."""
    query, key = torch.arange(*queries, device=device), torch.arange(*keys, device=device)
    position = key - query.div(size, rounding_mode='floor')[:, None] * size + margin
    span = size + 2 * margin
    return query % size, position.clamp(0, span - 1), (position >= 0) & (position < span)


def _aligned(table: Tensor) -> Tensor:
    """The table with its rows padded to a multiple of 16, contiguous."""
    missing = -table.shape[-1] % _TABLE_ROW
    return F.pad(table, (0, missing)) if missing else table.contiguous()


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels read any strides but that of the last dimension, so nothing that the layers pass is copied."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(name: str, programs: int, arguments: Arguments, operand: Tensor, **blocked: int) -> None:
    """Runs a kernel.

    Args:
        name: Which one.
        programs: How many programs for each block of `blocked`.
        arguments: By parameter; those that the kernel lacks are ignored.
        operand: (..., d), for whose device, dtype and head width the kernel is chosen.
        blocked: By block size parameter, what it divides among programs.
    """
    function = kernel(name)
    taken = {parameter: arguments[parameter] for parameter in function.arg_names if parameter in arguments}
    shapes = _blocks(name, operand)

    def run(shape: Blocks) -> None:
        options = compile_options(name, shape)
        count = programs * math.prod(ceil_div(size, options[block]) for block, size in blocked.items())
        function[(count,)](**taken, **options, enable_fp_fusion=True)

    if programs == 0:  # no images
        return
    kinds = [taken[name] for name in _CHOICE if name in taken]
    with torch.cuda.device(operand.device) if operand.is_cuda else contextlib.nullcontext():
        run(tuning.choose((name, operand.device, operand.dtype, *kinds), shapes, run))


def compile_options(name: str, blocks: Blocks) -> Arguments:
    """A block shape as arguments of a kernel's launch."""
    options: Arguments = dict(BLOCK_Q=blocks.queries, BLOCK_K=blocks.keys)
    options = {parameter: size for parameter, size in options.items() if parameter in kernel(name).arg_names}
    return dict(options, num_warps=blocks.num_warps, num_stages=blocks.num_stages, maxnreg=blocks.registers)


def _blocks(name: str, operand: Tensor) -> Tuple[Blocks, ...]:
    """Block shapes that a kernel may be launched with, the default first."""
    if _interpreting():
        return (_INTERPRETER_BLOCKS,)
    capability = torch.cuda.get_device_capability(operand.device) if operand.is_cuda else (9, 0)
    return tuple(block_shapes(name, operand.shape[-1], operand.dtype, capability))


@functools.cache
def kernel(name: str) -> Any:
    """The kernel function of that name."""
    modules = [importlib.import_module(f'.{module}', __package__) for module in ('kernels', 'long_range_kernels')]
    return next(getattr(module, f'{name}_kernel') for module in modules if hasattr(module, f'{name}_kernel'))


@functools.cache
def _interpreting() -> bool:
    """Does Triton run in its interpreter? Decided by the environment at Triton's import."""
    return bool(importlib.import_module('triton').knobs.runtime.interpret)


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(n - 1, 0).bit_length()
