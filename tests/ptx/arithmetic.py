"""Instructions that compute a number from registers of the same thread, as functions of arrays.

bfloat16, which numpy lacks, is held in uint16.
"""
import itertools
from typing import Callable, Dict, NamedTuple, Tuple

import numpy as np

Array = np.ndarray

DTYPES = {
    'pred': np.bool_,
    'b8': np.uint8, 'u8': np.uint8, 's8': np.int8,
    'b16': np.uint16, 'u16': np.uint16, 's16': np.int16, 'f16': np.float16, 'bf16': np.uint16,
    'b32': np.uint32, 'u32': np.uint32, 's32': np.int32, 'f32': np.float32, 'bf16x2': np.uint32, 'f16x2': np.uint32,
    'b64': np.uint64, 'u64': np.uint64, 's64': np.int64,
}
_INTEGERS = ('u16', 's16', 'u32', 's32', 'u64', 's64')
_BITS = ('b16', 'b32', 'b64')
_WIDER = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64'}
_SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Operation(NamedTuple):
    """A function of arrays of the operands' types."""
    function: Callable[..., Array]
    result: str
    operands: Tuple[str, ...]


# ---- integers -----------------------------------------------------------------------------------------------------


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero."""
    return (a - np.fmod(a, b)) // b


def _wide_product(a: Array, b: Array) -> Array:
    wide = np.dtype(f'{a.dtype.kind}{2 * a.dtype.itemsize}')
    return a.astype(wide) * b.astype(wide)


def _high_product(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    product = _wide_product(a, b)
    return (product >> product.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)


def _shift_left(a: Array, b: Array) -> Array:
    return a << b.astype(a.dtype)


def _shift_right(a: Array, b: Array) -> Array:
    return a >> b.astype(a.dtype)


def _bit_field(a: Array, position: Array, length: Array) -> Array:
    """`length` bits from a position on, the highest of them the sign of a signed number."""
    position, length = position.astype(a.dtype), length.astype(a.dtype)
    above = np.maximum(32 - position.astype(np.int64) - length, 0).astype(a.dtype)
    return a << above >> above + position


# ---- floating point -----------------------------------------------------------------------------------------------


def _fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    # the product of two float32 is exact in float64
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _flush(x: Array) -> Array:
    """Subnormal numbers become zeros (.ftz)."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.float32(0), x)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: _flush(function(*map(_flush, operands)))


def _to_bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7fff) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7fff), rounded).astype(np.uint16)


def from_bfloat16(x: Array) -> Array:
    """bfloat16 as uint16 -> float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_float16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def _packing(convert: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two numbers in a register, the first in the upper half."""
    return lambda high, low: convert(high).astype(np.uint32) << np.uint32(16) | convert(low)


# ---- the table ----------------------------------------------------------------------------------------------------


def _arithmetic() -> Dict[str, Operation]:
    table = {}
    functions = {
        'add': (2, np.add), 'sub': (2, np.subtract), 'mul.lo': (2, np.multiply), 'min': (2, np.minimum),
        'max': (2, np.maximum), 'div': (2, _quotient), 'rem': (2, np.fmod), 'neg': (1, np.negative), 'abs': (1, np.abs),
        'mad.lo': (3, lambda a, b, c: a * b + c),
    }
    for (name, (operands, function)), t in itertools.product(functions.items(), _INTEGERS):
        table[f'{name}.{t}'] = Operation(function, t, (t,) * operands)
    for t, wide in _WIDER.items():
        table[f'mul.wide.{t}'] = Operation(_wide_product, wide, (t, t))
        table[f'mad.wide.{t}'] = Operation(lambda a, b, c: _wide_product(a, b) + c, wide, (t, t, wide))
        table[f'mul.hi.{t}'] = Operation(_high_product, t, (t, t))
    for t in ('u32', 's32'):
        table[f'bfe.{t}'] = Operation(_bit_field, t, (t, 'u32', 'u32'))
    floats = {
        'add': (2, np.add), 'sub': (2, np.subtract), 'mul': (2, np.multiply), 'neg': (1, np.negative),
        'abs': (1, np.abs), 'min': (2, np.fmin), 'max': (2, np.fmax), 'min.NaN': (2, np.minimum),
        'max.NaN': (2, np.maximum), 'div.full': (2, np.divide), 'div.rn': (2, np.divide),
        'fma.rn': (3, _fused_multiply_add), 'fma.rn.ftz': (3, _flushing(_fused_multiply_add)),
        'ex2.approx.ftz': (1, _flushing(np.exp2)), 'lg2.approx.ftz': (1, _flushing(np.log2)),
    }
    for name, (operands, function) in floats.items():
        table[f'{name}.f32'] = Operation(function, 'f32', ('f32',) * operands)
    return table


def _bitwise() -> Dict[str, Operation]:
    table = {}
    functions = {
        'and': (2, np.bitwise_and), 'or': (2, np.bitwise_or), 'xor': (2, np.bitwise_xor), 'not': (1, np.invert),
    }
    for (name, (operands, function)), t in itertools.product(functions.items(), ('pred', *_BITS)):
        table[f'{name}.{t}'] = Operation(function, t, (t,) * operands)
    for t in _BITS:
        table[f'shl.{t}'] = Operation(_shift_left, t, (t, 'u32'))
    for t in (*_BITS, *_INTEGERS):
        table[f'shr.{t}'] = Operation(_shift_right, t, (t, 'u32'))
    return table


def _comparisons() -> Dict[str, Operation]:
    table = {}
    functions = {
        'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal, 'gt': np.greater,
        'ge': np.greater_equal,
    }
    for (name, function), t in itertools.product(functions.items(), (*_BITS, *_INTEGERS)):
        table[f'setp.{name}.{t}'] = Operation(function, 'pred', (t, t))

    def ordered(function):
        return lambda a, b: function(a, b) & ~(np.isnan(a) | np.isnan(b))

    def or_unordered(function):
        return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)

    for name, function in functions.items():
        table[f'setp.{name}.f32'] = Operation(ordered(function), 'pred', ('f32', 'f32'))
        table[f'setp.{name}u.f32'] = Operation(or_unordered(function), 'pred', ('f32', 'f32'))
    table['setp.nan.f32'] = Operation(lambda a, b: np.isnan(a) | np.isnan(b), 'pred', ('f32', 'f32'))
    table['setp.num.f32'] = Operation(lambda a, b: ~(np.isnan(a) | np.isnan(b)), 'pred', ('f32', 'f32'))
    for t in (*_BITS, *_INTEGERS, 'f32'):
        table[f'selp.{t}'] = Operation(lambda a, b, p: np.where(p, a, b), t, (t, t, 'pred'))
    return table


def _conversions() -> Dict[str, Operation]:
    table = {}

    def to(t):
        return lambda x: x.astype(DTYPES[t])

    for source, t in itertools.product(_INTEGERS, _INTEGERS):
        table[f'cvt.{t}.{source}'] = Operation(to(t), t, (source,))
    for t in ('s32', 'u32'):
        table[f'cvt.rn.f32.{t}'] = Operation(to('f32'), 'f32', (t,))
        table[f'cvt.rzi.{t}.f32'] = Operation(to(t), t, ('f32',))
    for t, convert in (('bf16', _to_bfloat16), ('f16', _to_float16)):
        table[f'cvt.rn.{t}.f32'] = Operation(convert, 'b16', ('f32',))
        table[f'cvt.rn.{t}x2.f32'] = Operation(_packing(convert), 'b32', ('f32', 'f32'))
    table['cvt.f32.bf16'] = Operation(from_bfloat16, 'f32', ('bf16',))
    table['cvt.f32.f16'] = Operation(to('f32'), 'f32', ('f16',))
    for t in ('pred', *_BITS, *_INTEGERS, 'f32'):
        table[f'mov.{t}'] = Operation(lambda x: x, t, (t,))
    return table


OPERATIONS: Dict[str, Operation] = {**_arithmetic(), **_bitwise(), **_comparisons(), **_conversions()}
