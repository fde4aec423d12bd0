"""Registers and memory of a launch that runs.

P programs, T threads of each in warps of 32. A register is an array (P, T), or of size 1 along an axis that it does not
depend on. N threads take part in an instruction.
"""
import contextlib
from typing import Dict, Iterator, Optional

import numpy as np

from .memory import Fault, GlobalMemory, Place, SharedMemory
from .program import Program

Array = np.ndarray


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
            return literal(operand, dtype)
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
        """Where the threads that take part access memory."""
        programs, threads = self.shape
        program, thread = np.arange(programs)[:, None], np.arange(threads)[None]
        return Place(self.select(program), address, self.select(thread // 32))

    @contextlib.contextmanager
    def only(self, threads: Array) -> Iterator[None]:
        """No others take part."""
        before = self.mask
        self.mask = threads if before is None else before & threads
        yield
        self.mask = before  # after a fault it stays, as it tells which threads the accesses are of

    def whole(self, of: str) -> Array:
        """Which programs take part, (P,), or warps, (P, T / 32). Raises if only some threads of one do."""
        threads = self.shape[1] if of == 'program' else 32
        mask = np.broadcast_to(True if self.mask is None else self.mask, self.shape)
        mask = mask.reshape(self.shape[0], -1, threads)
        if (mask.any(2) != mask.all(2)).any():
            raise Fault(f'only some threads of a {of} take part')
        return mask.all(2)[:, 0] if of == 'program' else mask.all(2)


def literal(text: str, dtype: type) -> Array:
    """'7', '-0x10', '0f3F800000' or the address of shared memory as an array (1, 1)."""
    bits = 8 * np.dtype(dtype).itemsize
    if text == 'global_smem':
        number = 0
    else:
        number = int(text[2:], 16) if text.startswith('0f') else int(text.rstrip('U'), 0)
    if dtype == np.bool_:
        return np.array([[number != 0]])
    return np.array([[number % 2 ** bits]], f'u{bits // 8}').view(dtype)
