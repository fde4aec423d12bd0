"""Runs a PTX kernel of compute capability 8.0 on the CPU.

All programs of a launch run at once, every register is an array (programs, threads), or of size 1 along an axis that
it does not depend on. Threads that branch apart wait: always those run that are furthest behind in the text, until they
meet others. What a GPU leaves open is not simulated but checked, see `memory`.

P programs, T threads of each in warps of 32.
"""
import math
import re
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np

from .instructions import DTYPES, OPERATIONS, from_bfloat16
from .memory import Fault, GlobalMemory, Place, SharedMemory
from .program import Instruction, Program, parse

Array = np.ndarray
Step = Callable[['Execution'], None]

_LANES = np.arange(32)
_MEMORY_ACCESS = re.compile(r'(?P<do>ld|st)\.(?P<space>global|shared(::cta)?)(\.v(?P<count>[24]))?\.(?P<type>[bsuf]\d+)')
_COPY = re.compile(r'cp\.async\.(ca|cg)\.shared\.global')
_LDMATRIX = re.compile(r'ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16')
_MMA = re.compile(r'mma\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<type>bf16|f16|tf32)\.(?P=type)\.f32')
_BRANCHES = ('bra', 'bra.uni', 'ret')


class UnknownInstruction(Exception):
    """The interpreter lacks it."""


class Execution:
    """State of a launch."""

    def __init__(self, program: Program, parameters: Dict[str, int], memory: GlobalMemory, shared: SharedMemory,
                 programs: int, threads: int) -> None:
        self.program, self.parameters = program, parameters
        self.memory, self.shared = memory, shared
        self.shape = programs, threads
        self.registers: Dict[str, Array] = {
            '%tid.x': np.arange(threads, dtype=np.uint32)[None],
            '%ctaid.x': np.arange(programs, dtype=np.uint32)[:, None],
        }
        self.mask: Optional[Array] = None
        """Which threads take part in the present instruction. None if all."""

    def read(self, operand: str, dtype: type) -> Array:
        """A register's lowest bits, a literal, or the address of shared memory, which is 0."""
        if not operand.startswith('%'):
            return _literal(operand, dtype)
        if operand not in self.registers:
            raise Fault(f'reads {operand}, which nothing wrote')
        value, size = self.registers[operand], np.dtype(dtype).itemsize
        return (value if value.itemsize == size else value.astype(f'u{size}')).view(dtype)

    def write(self, register: str, value: Array) -> None:
        """To the threads that take part. Signed numbers are extended to the register's width."""
        if register == '_':
            return
        if value.dtype.kind == 'f':
            value = value.view(f'u{value.itemsize}')
        value = value.astype(self.program.registers[register.rstrip('0123456789')], copy=False)
        if self.mask is not None:
            # what nothing wrote had better be conspicuous
            before = self.registers.get(register, np.invert(np.zeros_like(value)))
            value = np.where(self.mask, value, before)
        self.registers[register] = value

    def select(self, x: Array) -> Array:
        """The entries of the threads that take part. (N,)"""
        x = np.broadcast_to(x, self.shape)
        return x.ravel() if self.mask is None else x[np.broadcast_to(self.mask, self.shape)]

    def spread(self, x: Array) -> Array:
        """The reverse. (P, T)"""
        if self.mask is None:
            return x.reshape(self.shape)
        result = np.zeros(self.shape, x.dtype)
        result[np.broadcast_to(self.mask, self.shape)] = x
        return result

    def address(self, operand: str) -> Array:
        """[base + offset] of the threads that take part. (N,)"""
        base, _, offset = operand.strip('[]').partition('+')
        wide = self.program.registers.get(base.rstrip('0123456789'), np.uint32)
        return self.select(self.read(base, wide)).astype(np.int64) + int(offset or 0)

    def place(self, address: Array) -> Place:
        """Where the threads that take part access shared memory."""
        programs, threads = self.shape
        program, thread = np.arange(programs)[:, None], np.arange(threads)[None]
        return Place(self.select(program), address, self.select(thread // 32))

    def whole(self, of: str) -> Array:
        """Which programs take part, (P,), or warps, (P, T / 32). Raises if only some threads of one do."""
        threads = self.shape[1] if of == 'program' else 32
        mask = np.broadcast_to(True if self.mask is None else self.mask, self.shape)
        mask = mask.reshape(self.shape[0], -1, threads)
        if (mask.any(2) != mask.all(2)).any():
            raise Fault(f'only some threads of a {of} take part')
        return mask.all(2)[:, 0] if of == 'program' else mask.all(2)


class Kernel:
    """A kernel, ready to run."""

    def __init__(self, ptx: str) -> None:
        """
        Raises:
            UnknownInstruction: There are instructions that the interpreter lacks; names them.
        """
        self.program = parse(ptx)
        unknown, self._steps = [], []
        for instruction in self.program.instructions:
            try:
                self._steps.append(_decode(instruction))
            except UnknownInstruction:
                unknown.append(instruction.text)
        if unknown:
            raise UnknownInstruction(f'{self.program.name} has instructions that are not known: {"; ".join(unknown)}')

    def run(self, parameters: Dict[str, int], memory: GlobalMemory, programs: int, threads: int, shared: int) -> None:
        """Runs all programs of a launch.

        Args:
            parameters: By name: addresses, integers, and the bits of floating point numbers.
            memory: Read and written.
            programs: How many.
            threads: Of each program.
            shared: Bytes of shared memory.

        Raises:
            Fault: The kernel does something that is not allowed; says which instruction, program and thread.
        """
        sizes = [_shared_granule(instruction) for instruction in self.program.instructions]
        shared_memory = SharedMemory(programs, shared, min(filter(None, sizes), default=4))
        execution = Execution(self.program, parameters, memory, shared_memory, programs, threads)
        waiting = {0: np.ones((1, 1), np.bool_)}
        with np.errstate(all='ignore'):
            while waiting:
                number = min(waiting)
                self._run_to_branch(execution, number, waiting)

    def _run_to_branch(self, execution: Execution, number: int, waiting: Dict[int, Array]) -> None:
        """Runs the threads that wait at an instruction, and those that they meet, up to a branch."""
        active = waiting.pop(number)
        everyone = bool(active.all())
        for number in range(number, len(self._steps)):
            if number in waiting:
                active = active | waiting.pop(number)
                everyone = bool(active.all())
            instruction = self.program.instructions[number]
            execution.mask = _guarded(execution, instruction, None if everyone else active)
            if instruction.opcode in _BRANCHES:
                taken = active if execution.mask is None else execution.mask
                if instruction.opcode != 'ret':
                    _wait(waiting, self.program.labels[instruction.operands[0]], taken)
                _wait(waiting, number + 1, active & ~taken)
                return
            if execution.mask is None or execution.mask.any():
                try:
                    self._steps[number](execution)
                except Fault as fault:
                    raise _located(fault, execution, instruction) from None


def _guarded(execution: Execution, instruction: Instruction, active: Optional[Array]) -> Optional[Array]:
    """The active threads that take part in an instruction, None if all."""
    if instruction.guard is None:
        return active
    guard = execution.read(instruction.guard, np.bool_) ^ instruction.negated
    mask = guard if active is None else active & guard
    return None if mask.all() else mask


def _wait(waiting: Dict[int, Array], number: int, threads: Array) -> None:
    if threads.any():
        waiting[number] = waiting[number] | threads if number in waiting else threads


def _located(fault: Fault, execution: Execution, instruction: Instruction) -> Fault:
    """The same with the place where it occurred."""
    programs, threads = execution.shape
    numbers = execution.select(np.arange(programs * threads).reshape(programs, threads))
    program, thread = divmod(int(numbers[min(fault.access, numbers.size - 1)]), threads)
    name = execution.program.name
    return type(fault)(f'{name}: {instruction}: {fault}, in program {program}, thread {thread}', fault.access)


def _literal(text: str, dtype: type) -> Array:
    """'7', '-0x10', '0f3F800000' or the address of shared memory as an array (1, 1)."""
    bits = 8 * np.dtype(dtype).itemsize
    if text == 'global_smem':
        number = 0
    else:
        number = int(text[2:], 16) if text.startswith('0f') else int(text.rstrip('U'), 0)
    if dtype == np.bool_:
        return np.array([[number != 0]])
    return np.array([[number % 2 ** bits]], f'u{bits // 8}').view(dtype)


def _shared_granule(instruction: Instruction) -> Optional[int]:
    """Bytes of the smallest piece of shared memory that an instruction may access without the rest."""
    match = _MEMORY_ACCESS.fullmatch(instruction.opcode)
    if match and match['space'] != 'global':
        return np.dtype(DTYPES[match['type']]).itemsize
    return None


# ---- instructions by kind -----------------------------------------------------------------------------------------


def _decode(instruction: Instruction) -> Step:
    """A function that executes the instruction."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _BRANCHES:
        return _nothing
    if opcode.startswith('mov.b') and any(isinstance(operand, tuple) for operand in operands):
        return _repack(opcode, *operands)
    if opcode in OPERATIONS:
        return _operation(opcode, *operands)
    if opcode.startswith('ld.param.'):
        return _load_parameter(DTYPES[opcode[9:]], *operands)
    if opcode in _SYNCHRONISATION:
        return _SYNCHRONISATION[opcode](*operands)
    for pattern, decode in _PATTERNS:
        match = pattern.fullmatch(opcode)
        if match:
            return decode(match, *operands)
    raise UnknownInstruction


def _nothing(execution: Execution) -> None:
    """Branches change no registers."""


def _operation(opcode: str, destination: str, *sources: str) -> Step:
    operation = OPERATIONS[opcode]
    dtypes = [DTYPES[t] for t in operation.operands]

    def step(execution: Execution) -> None:
        execution.write(destination, operation.function(*map(execution.read, sources, dtypes)))

    return step


def _load_parameter(dtype: type, destination: str, source: str) -> Step:
    def step(execution: Execution) -> None:
        execution.write(destination, _literal(str(execution.parameters[source.strip('[]')]), dtype))

    return step


def _repack(opcode: str, destination, source) -> Step:
    """mov between a register and a vector of its parts, the first of which has the lowest bits."""
    bits = int(opcode[5:])
    whole = DTYPES[f'b{bits}']

    def unpack(execution: Execution) -> None:
        value, width = execution.read(source, whole), bits // len(destination)
        for i, register in enumerate(destination):
            execution.write(register, (value >> whole(i * width)).astype(f'u{width // 8}'))

    def pack(execution: Execution) -> None:
        width = bits // len(source)
        parts = [execution.read(part, DTYPES[f'b{width}']).astype(whole) << whole(i * width)
                 for i, part in enumerate(source)]
        execution.write(destination, sum(parts[1:], parts[0]))

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
        where = execution.address(address)
        if is_global:
            values = execution.memory.load(where, unsigned, len(registers))
        else:
            values = execution.shared.load(execution.place(where), unsigned, len(registers))
        for i, register in enumerate(registers):
            execution.write(register, execution.spread(values[:, i]).view(dtype))

    def store(execution: Execution) -> None:
        where = execution.address(address)
        values = np.stack([execution.select(execution.read(register, unsigned)) for register in registers], 1)
        if is_global:
            execution.memory.store(where, values)
        else:
            execution.shared.store(execution.place(where), values)

    return load if match['do'] == 'ld' else store


def _copy(match, destination: str, source: str, size: str, used: Optional[str] = None) -> Step:
    """cp.async, of which the bytes that are not used are zeros."""
    words = int(size, 0) // 4

    def step(execution: Execution) -> None:
        to, place = execution.address(source), execution.place(execution.address(destination))
        read = np.ones(to.shape, np.bool_)
        if used is not None:
            taken = execution.select(execution.read(used, np.uint32))
            read = taken != 0
            if not np.isin(taken, (0, 4 * words)).all():
                raise UnknownInstruction(f'copies that are filled up with zeros in part: {sorted(set(taken))}')
        values = np.zeros((to.size, words), np.uint32)
        try:
            values[read] = execution.memory.load(to[read], np.uint32, words)
        except Fault as fault:
            fault.access = int(np.flatnonzero(read)[fault.access])
            raise
        execution.shared.start_copy(place, values)

    return step


def _barrier(number: str) -> Step:
    if number != '0':
        raise UnknownInstruction
    return lambda execution: execution.shared.barrier(execution.whole('program'))


def _end_group() -> Step:
    return lambda execution: execution.shared.end_group(execution.whole('program'))


def _wait_group(pending: str) -> Step:
    return lambda execution: execution.shared.wait(execution.whole('program'), int(pending, 0))


def _shuffle(choose: Callable[[Array], Array]) -> Callable[..., Step]:
    """shfl: the value of another lane of the warp."""

    def decode(destination: str, source: str, lane: str, clamp: str, members: str) -> Step:
        if int(clamp, 0) != 31 or int(members, 0) not in (-1, 2 ** 32 - 1):
            raise UnknownInstruction

        def step(execution: Execution) -> None:
            execution.whole('warp')
            value, number = (_by_warp(execution, operand) for operand in (source, lane))
            chosen = choose(number.astype(np.int64)) & 31
            execution.write(destination, np.take_along_axis(value, chosen, 2).reshape(execution.shape))

        return step

    return decode


def _load_matrix(match, registers: Tuple[str, ...], address: str) -> Step:
    """ldmatrix: lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i, 8 x 8 numbers of 16 bits."""
    count = int(match['count'])
    row, pair = _LANES // 4, _LANES % 4 * 2  # a lane gets two neighbours in a row, or in a column if transposed

    def step(execution: Execution) -> None:
        execution.whole('warp')
        mask = execution.mask
        lanes = np.arange(execution.shape[1])[None] % 32 < 8 * count
        execution.mask = lanes if mask is None else lanes & mask
        rows = execution.shared.load(execution.place(execution.address(address)), np.uint16, 8)
        rows = np.stack([execution.spread(rows[:, i]) for i in range(8)], 2)  # (P, T, 8)
        execution.mask = mask
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
    bits = np.stack([np.broadcast_to(execution.read(register, np.uint32), execution.shape) for register in registers], 2)
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


_SYNCHRONISATION: Dict[str, Callable[..., Step]] = {
    'bar.sync': _barrier,
    'cp.async.commit_group': _end_group,
    'cp.async.wait_group': _wait_group,
    'shfl.sync.bfly.b32': _shuffle(lambda lane: _LANES ^ lane),
    'shfl.sync.idx.b32': _shuffle(lambda lane: lane),
}
_PATTERNS: List[Tuple[re.Pattern, Callable[..., Step]]] = [
    (_MEMORY_ACCESS, _access), (_COPY, _copy), (_LDMATRIX, _load_matrix), (_MMA, _multiply),
]


def bits(number: float) -> int:
    """Of a float32."""
    return int(np.float32(number).view(np.uint32))


def grid_size(grid: Tuple[int, ...]) -> int:
    """Programs of a launch."""
    return math.prod(grid)
