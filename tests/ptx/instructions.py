"""What each instruction does to an execution.

P programs, T threads of each in warps of 32; N threads take part.
"""
import functools
import re
from typing import Callable, List, Optional, Tuple

import numpy as np

from .arithmetic import DTYPES, OPERATIONS, from_bfloat16
from .execution import Execution, literal
from .program import Instruction

Array = np.ndarray
Step = Callable[[Execution], None]

BRANCHES = ('bra', 'bra.uni', 'ret')
_ACCESS = r'(?P<do>ld|st)\.(?P<space>global|shared(::cta)?)(\.v(?P<count>[24]))?\.(?P<type>[bsuf]\d+)'
_LANES = np.arange(32)


class UnknownInstruction(Exception):
    """The interpreter lacks it."""


def decode(instruction: Instruction) -> Step:
    """A function that executes the instruction.

    Raises:
        UnknownInstruction: There is none.
    """
    opcode, operands = instruction.opcode, instruction.operands
    vectors = any(isinstance(operand, tuple) for operand in operands)
    if '|' in instruction.text:  # a second result
        raise UnknownInstruction
    if opcode in BRANCHES:
        return _nothing
    if opcode in OPERATIONS and not vectors:
        return _operation(opcode, *operands)
    for pattern, build in _PATTERNS:
        match = re.fullmatch(pattern, opcode)
        if match:
            return build(match, *operands)
    raise UnknownInstruction


def _nothing(execution: Execution) -> None:
    """Branches change no registers."""


def _operation(opcode: str, destination: str, *sources: str) -> Step:
    operation = OPERATIONS[opcode]
    if len(sources) != len(operation.operands):
        raise UnknownInstruction
    dtypes = [DTYPES[t] for t in operation.operands]

    def step(execution: Execution) -> None:
        execution.write(destination, operation.function(*map(execution.read, sources, dtypes)))

    return step


def _load_parameter(match, destination: str, source: str) -> Step:
    dtype = DTYPES[match['type']]

    def step(execution: Execution) -> None:
        execution.write(destination, literal(str(execution.parameters[source.strip('[]')]), dtype))

    return step


def _repack(match, destination, source) -> Step:
    """mov between a register and a vector of its parts, the first of which has the lowest bits."""
    bits = int(match['bits'])
    whole = DTYPES[f'b{bits}']

    def unpack(execution: Execution) -> None:
        value, width = execution.read(source, whole), bits // len(destination)
        for i, register in enumerate(destination):
            execution.write(register, (value >> whole(i * width)).astype(f'u{width // 8}'))

    def pack(execution: Execution) -> None:
        width = bits // len(source)
        parts = [execution.read(part, DTYPES[f'b{width}']).astype(whole) << whole(i * width)
                 for i, part in enumerate(source)]
        execution.write(destination, functools.reduce(np.bitwise_or, parts))

    return unpack if isinstance(destination, tuple) else pack


def _access(match, first, second) -> Step:
    """ld and st."""
    dtype, is_global = DTYPES[match['type']], match['space'] == 'global'
    unsigned = np.dtype(f'u{np.dtype(dtype).itemsize}').type
    address, registers = (second, first) if match['do'] == 'ld' else (first, second)
    registers = registers if isinstance(registers, tuple) else (registers,)
    if len(registers) != int(match['count'] or 1):
        raise UnknownInstruction

    def load(execution: Execution) -> None:
        memory = execution.memory if is_global else execution.shared
        values = memory.load(execution.place(execution.address(address)), unsigned, len(registers))
        for i, register in enumerate(registers):
            execution.write(register, execution.spread(values[:, i]).view(dtype))

    def store(execution: Execution) -> None:
        memory = execution.memory if is_global else execution.shared
        values = np.stack([execution.select(execution.read(register, unsigned)) for register in registers], 1)
        memory.store(execution.place(execution.address(address)), values)

    return load if match['do'] == 'ld' else store


def _copy(match, destination: str, source: str, size: str, used: Optional[str] = None) -> Step:
    """cp.async, whose bytes are zeros where none of the source's are to be used."""
    size = int(size, 0)

    def step(execution: Execution) -> None:
        values = np.zeros((*execution.shape, size // 4), np.uint32)
        read = execution.read(used or str(size), np.uint32)
        if not np.isin(execution.select(read), (0, size)).all():
            raise UnknownInstruction(f'cp.async of some of {size} bytes')
        with execution.only(read != 0):
            loaded = execution.memory.load(execution.place(execution.address(source)), np.uint32, size // 4)
            for i in range(size // 4):
                values[..., i] = execution.spread(loaded[:, i])
        place = execution.place(execution.address(destination))
        execution.shared.start_copy(place, np.stack([execution.select(x) for x in np.moveaxis(values, 2, 0)], 1))

    return step


def _barrier(match, number: str) -> Step:
    if number != '0':
        raise UnknownInstruction
    return lambda execution: execution.shared.barrier(execution.whole('program'))


def _warp_barrier(match, members: str) -> Step:
    """Threads of a warp run in step anyhow, but may not have branched apart."""
    if int(members, 0) not in (-1, 2 ** 32 - 1):
        raise UnknownInstruction

    def step(execution: Execution) -> None:
        execution.whole('warp')

    return step


def _end_group(match) -> Step:
    return lambda execution: execution.shared.end_group(execution.whole('program'))


def _wait_group(match, pending: str) -> Step:
    return lambda execution: execution.shared.wait(execution.whole('program'), int(pending, 0))


def _shuffle(choose: Callable[[Array], Array]) -> Callable[..., Step]:
    """shfl: the value of another lane of the warp."""

    def build(match, destination: str, source: str, lane: str, clamp: str, members: str) -> Step:
        if int(clamp, 0) != 31 or int(members, 0) not in (-1, 2 ** 32 - 1):
            raise UnknownInstruction

        def step(execution: Execution) -> None:
            execution.whole('warp')
            value, number = (_by_warp(execution, operand) for operand in (source, lane))
            chosen = choose(number.astype(np.int64)) & 31
            execution.write(destination, np.take_along_axis(value, chosen, 2).reshape(execution.shape))

        return step

    return build


def _load_matrix(match, registers: Tuple[str, ...], address: str) -> Step:
    """ldmatrix: lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i, 8 x 8 numbers of 16 bits."""
    count = int(match['count'])
    row, pair = _LANES // 4, _LANES % 4 * 2  # a lane gets two neighbours in a row, or in a column if transposed

    def step(execution: Execution) -> None:
        execution.whole('warp')
        with execution.only(np.arange(execution.shape[1])[None] % 32 < 8 * count):
            rows = execution.shared.load(execution.place(execution.address(address)), np.uint16, 8)
            rows = np.stack([execution.spread(rows[:, i]) for i in range(8)], 2)  # (P, T, 8)
        matrices = rows.reshape(execution.shape[0], -1, 4, 8, 8).astype(np.uint32)  # (P, warps, matrix, row, column)
        for i, register in enumerate(registers):
            matrix = matrices[:, :, i].swapaxes(-1, -2) if match['trans'] else matrices[:, :, i]
            value = matrix[..., row, pair] | matrix[..., row, pair + 1] << np.uint32(16)
            execution.write(register, value.reshape(execution.shape))

    return step


def _multiply(match, result: Tuple[str, ...], a: Tuple[str, ...], b: Tuple[str, ...], c: Tuple[str, ...]) -> Step:
    """mma: c (16, 8) + a (16, k) @ b (k, 8), of which each thread has a few entries."""
    k = int(match['k'])
    if (k == 8) != (match['type'] == 'tf32'):
        raise UnknownInstruction
    a_places, b_places, c_places = _fragments(k)

    def step(execution: Execution) -> None:
        execution.whole('warp')
        a_entries, b_entries = (_entries(execution, registers, match['type']) for registers in (a, b))
        c_entries = _entries(execution, c, 'f32')
        total = c_entries[:, c_places] + a_entries[:, a_places] @ b_entries[:, b_places]
        # back to the threads, whose entries are all different ones
        entries = np.empty_like(c_entries)
        entries[:, c_places] = total
        entries = entries.reshape(*execution.shape, 4)
        for i, register in enumerate(result):
            execution.write(register, entries[..., i])

    return step


def _fragments(k: int) -> Tuple[Array, Array, Array]:
    """Where the entries of a (16, k), b (k, 8) and c (16, 8) are among those of a warp's lanes, lane after lane."""
    group, thread = _LANES[:, None] // 4, _LANES[:, None] % 4
    if k == 16:
        i, j = np.arange(8), np.arange(4)
        a = group + i // 2 % 2 * 8, thread * 2 + i % 2 + i // 4 * 8
        b = thread * 2 + j % 2 + j // 2 * 8, group + 0 * j
    else:
        i, j = np.arange(4), np.arange(2)
        a = group + i % 2 * 8, thread + i // 2 * 4
        b = thread + j * 4, group + 0 * j
    i = np.arange(4)
    c = group + i // 2 * 8, thread * 2 + i % 2
    return tuple(_places(rows, cols, shape) for (rows, cols), shape in ((a, (16, k)), (b, (k, 8)), (c, (16, 8))))


def _places(rows: Array, cols: Array, shape: Tuple[int, int]) -> Array:
    places = np.empty(shape, np.int64)
    places[rows, cols] = np.arange(rows.size).reshape(rows.shape)
    return places


def _entries(execution: Execution, registers: Tuple[str, ...], dtype: str) -> Array:
    """The numbers in some registers of each warp's lanes as float32, lane after lane. (warps of all programs, n)"""
    values = [np.broadcast_to(execution.read(register, np.uint32), execution.shape) for register in registers]
    bits = np.stack(values, 2)
    if dtype == 'bf16':
        numbers = from_bfloat16(bits.view(np.uint16))
    elif dtype == 'f16':
        numbers = bits.view(np.float16).astype(np.float32)
    else:
        numbers = (bits & np.uint32(0xffffe000) if dtype == 'tf32' else bits).view(np.float32)
    return numbers.reshape(execution.shape[0] * execution.shape[1] // 32, -1)


def _by_warp(execution: Execution, operand: str) -> Array:
    """(P, warps, 32)"""
    return np.broadcast_to(execution.read(operand, np.uint32), execution.shape).reshape(execution.shape[0], -1, 32)


def shared_granule(instruction: Instruction) -> Optional[int]:
    """Bytes of the smallest piece of shared memory that an instruction may access without the rest."""
    match = re.fullmatch(_ACCESS, instruction.opcode)
    if match and match['space'] != 'global':
        return np.dtype(DTYPES[match['type']]).itemsize
    return None


_PATTERNS: List[Tuple[str, Callable[..., Step]]] = [
    (r'ld\.param\.(?P<type>[bsuf](32|64))', _load_parameter),
    (r'mov\.b(?P<bits>32|64)', _repack),
    (_ACCESS, _access),
    (r'cp\.async\.(ca|cg)\.shared\.global', _copy),
    (r'cp\.async\.commit_group', _end_group),
    (r'cp\.async\.wait_group', _wait_group),
    (r'bar\.sync', _barrier),
    (r'bar\.warp\.sync', _warp_barrier),
    (r'shfl\.sync\.bfly\.b32', _shuffle(lambda lane: _LANES ^ lane)),
    (r'shfl\.sync\.idx\.b32', _shuffle(lambda lane: lane)),
    (r'ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16', _load_matrix),
    (r'mma\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<type>bf16|f16|tf32)\.(?P=type)\.f32', _multiply),
]
