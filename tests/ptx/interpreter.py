"""Runs a PTX kernel of compute capability 8.0 on the CPU.

All programs of a launch run at once. Threads that branch apart wait: always those run that are furthest behind in the
text, until they meet others. What a GPU leaves open, such as the order of warps, is not simulated but checked; see
`memory`.
"""
from typing import Dict, Optional

import numpy as np

from .execution import Execution
from .instructions import BRANCHES, UnknownInstruction, decode, shared_granule
from .memory import Fault, GlobalMemory, SharedMemory
from .program import Instruction, parse

Array = np.ndarray


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
                self._steps.append(decode(instruction))
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
        sizes = [shared_granule(instruction) for instruction in self.program.instructions]
        shared_memory = SharedMemory(programs, shared, min([4, *filter(None, sizes)]))
        execution = Execution(self.program, parameters, memory, shared_memory, programs, threads)
        waiting = {0: np.ones((1, 1), np.bool_)}
        with np.errstate(all='ignore'):
            while waiting:
                self._run_to_branch(execution, waiting)

    def _run_to_branch(self, execution: Execution, waiting: Dict[int, Array]) -> None:
        """Runs the threads that are furthest behind, and those that they meet, up to a branch.

        Args:
            waiting: Which threads, (P, T), by the number of the instruction that they are at.
        """
        first = min(waiting)
        active = waiting.pop(first)
        everyone = bool(active.all())
        for number in range(first, len(self._steps)):
            if number in waiting:
                active = active | waiting.pop(number)
                everyone = bool(active.all())
            instruction = self.program.instructions[number]
            execution.mask = _guarded(execution, instruction, None if everyone else active)
            if instruction.opcode in BRANCHES:
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
