"""Reads the text of a PTX kernel.

Reference: the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""
import re
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np

Operand = Union[str, Tuple[str, ...]]

_ENTRY = re.compile(r'\.entry\s+(?P<name>\w+)\((?P<parameters>.*?)\)[^{]*\n\{(?P<body>.*?)\n\}', re.DOTALL)
_PARAMETER = re.compile(r'\.param\s+\.(?P<type>\w+)[^,]*?\s(?P<name>\w+)\s*(?:,|$)')
_REGISTERS = re.compile(r'\.reg\s+\.(?P<type>\w+)\s+(?P<prefix>%[a-z]+)<')
_STATEMENT = re.compile(
    r'(?P<label>[$\w]+):|(?:@(?P<not>!?)(?P<guard>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);')
_REGISTER_DTYPES = {'pred': np.bool_, 'b16': np.uint16, 'b32': np.uint32, 'b64': np.uint64}


class Instruction(NamedTuple):
    """A statement of a kernel."""
    opcode: str
    operands: Tuple[Operand, ...]
    """Vectors, {a, b}, are tuples, addresses keep their brackets."""
    guard: Optional[str]
    """The predicate register that threads need to take part."""
    negated: bool
    """Takes part where the predicate is false."""
    text: str

    def __str__(self) -> str:
        return self.text


class Program(NamedTuple):
    """A kernel."""
    name: str
    parameters: Dict[str, str]
    """Type by name, in order."""
    registers: Dict[str, type]
    """dtype by what the registers' names begin with."""
    instructions: List[Instruction]
    labels: Dict[str, int]
    """The instruction that follows, by label."""


def parse(ptx: str) -> Program:
    """The only kernel of a PTX module.

    Raises:
        ValueError: There is something that is no statement.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError(f'expected a module with a kernel (.entry), got {ptx[:200]!r}.')
    # directives stand in lines of their own
    lines = [line.partition('//')[0].strip() for line in entry['body'].splitlines()]
    registers = {match['prefix']: _REGISTER_DTYPES[match['type']] for match in map(_REGISTERS.match, lines) if match}
    body = '\n'.join(line for line in lines if not line.startswith('.'))
    rest = _STATEMENT.sub('', body)
    if rest.strip(' \n{}'):
        raise ValueError(f'expected statements of PTX, got {rest.strip()[:200]!r}.')

    instructions: List[Instruction] = []
    labels: Dict[str, int] = {}
    for match in _STATEMENT.finditer(body):
        if match['label']:
            labels[match['label']] = len(instructions)
        else:
            instructions.append(Instruction(
                match['opcode'], _operands(match['operands']), match['guard'], match['not'] == '!',
                ' '.join(match[0].rstrip(';').split())))
    parameters = {match['name']: match['type'] for match in _PARAMETER.finditer(entry['parameters'].strip())}
    return Program(entry['name'], parameters, registers, instructions, labels)


def _operands(text: str) -> Tuple[Operand, ...]:
    """'%r1, [%rd2 + 4], {%r3, %r4}' -> ('%r1', '[%rd2+4]', ('%r3', '%r4'))"""
    parts = re.findall(r'\{[^}]*\}|[^,{}]+', ''.join(text.split()))
    return tuple(tuple(part.strip('{}').split(',')) if part.startswith('{') else part for part in parts)
