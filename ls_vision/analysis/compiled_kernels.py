"""What the Triton kernels compile to, for GPUs that need not be there: registers, spills, shared memory, loops.

Triton compiles to PTX, its assembler to machine code, and its disassembler lists that. Instructions of a loop are
counted as they stand in the code, from the target of each backward jump to the jump.
"""
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch

from ls_vision.ops.backends.triton import launch, long_range
from ls_vision.ops.window import Window, make_window

WINDOW_KERNELS = ('forward', 'query_gradient', 'key_gradient', 'additional_gradient', 'bias_gradient')
SUM_KERNELS = ('summaries', 'summaries_gradient', 'global_attention', 'global_gradient', 'merge')
# most that a block of threads may have, in bytes
SHARED_MEMORY = {80: 160 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_FLOAT32 = (
    'peak_ptr', 'log_total_ptr', 'delta_ptr', 'dbias_ptr', 'dlse_ptr', 'parts_ptr', 'part_peaks_ptr', 'part_totals_ptr')
_ALIGNED = ('_ptr', '_b', '_y', '_x', '_h', '_m', '_q', '_k', 'x_n', 'k_n', 'q_r', '_kind')
_UNALIGNED = ('tiles', 'peak', 'log_total', 'padding')


class Compiled(NamedTuple):
    """A kernel as a GPU would run it."""
    blocks: launch.Blocks
    registers: int
    """Per thread."""
    spilled: int
    """Bytes stored and loaded for want of registers."""
    shared: int
    """Bytes of shared memory per block of threads."""
    loops: list[int]
    """Instructions of each loop, the longest first; empty unless asked for."""
    products: list[int]
    """Matrix products among them."""


def compile_kernel(
        kernel: str,
        arch: int,
        dtype: torch.dtype,
        head_dim: int,
        window_size: Union[int, tuple[int, int], Window] = 7,
        num_additional: int = 9,
        has_bias: bool = True,
        has_padding: bool = False,
        with_loops: bool = False,
) -> list[Compiled]:
    """Compiles a kernel with each of its block shapes.

    Args:
        kernel: One of `WINDOW_KERNELS` and `SUM_KERNELS`.
        arch: Compute capability times ten.
        dtype: Of the operands.
        head_dim: d.
        window_size: w, (rows, columns) or a `Window`.
        num_additional: M; of sums the number of rows.
        has_bias: Whether there is a position bias.
        has_padding: Whether there is a mask of padding.
        with_loops: Disassemble it and count the loops' instructions.
    """
    if kernel in SUM_KERNELS:
        constants = dict(
            long_range.constants(head_dim, num_additional, 2, dtype, False), M=num_additional, HAS_LSE=False)
    else:
        constants = launch.constants(head_dim, make_window(window_size), num_additional, has_bias, has_padding, dtype)
    found = []
    for blocks in launch.block_shapes(kernel, head_dim, dtype, (arch // 10, arch % 10)):
        compiled = compile_ahead(kernel, arch, dtype, {**constants, **launch.compile_options(kernel, blocks)})
        with tempfile.TemporaryDirectory() as folder:
            registers, spilled = assemble(compiled.asm['ptx'], arch, Path(folder) / 'kernel.cubin')
            loops = count_loops(disassemble(Path(folder) / 'kernel.cubin')) if with_loops else []
        found.append(Compiled(
            blocks, registers, spilled, compiled.metadata.shared, [n for n, _ in loops], [n for _, n in loops]))
    return found


def compile_ahead(kernel: str, arch: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """What a launch compiles, pointers and strides divisible by 16 as they are in models."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function = launch.kernel(kernel)
    operand = {torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16'}[dtype]
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in options:
            signature[name], constants[name] = 'constexpr', options[name]
        elif name == 'padding_ptr':
            signature[name] = '*u8' if options['HAS_PADDING'] else operand
        elif name.endswith('_ptr'):
            signature[name] = '*fp32' if name in _FLOAT32 else operand
        else:
            signature[name] = 'fp32' if name == 'scale' else 'i32'
        if name.endswith(_ALIGNED) and not name.startswith(_UNALIGNED):
            attributes[(i,)] = [['tt.divisibility', 16]]
    launch_options = {name: options[name] for name in ('num_warps', 'num_stages', 'maxnreg')}
    return triton.compile(
        ASTSource(function, signature, constants, attributes), target=GPUTarget('cuda', arch, 32),
        options={**launch_options, 'enable_fp_fusion': True})


def assemble(ptx: str, arch: int, out: Path) -> tuple[int, int]:
    """Writes machine code, by the first of Triton's assemblers that knows the PTX's version -> registers, spilled."""
    source = out.with_suffix('.ptx')
    source.write_text(ptx)
    gpu = f'sm_{arch}a' if arch >= 90 else f'sm_{arch}'
    # the second is given an option that Triton gives it
    for assembler in (['ptxas'], ['ptxas-blackwell', '--regAllocOptLevel=2']):
        command = [str(_tools() / assembler[0]), *assembler[1:], '-v', '--gpu-name', gpu, str(source), '-o', str(out)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            break
    log = run.stdout + run.stderr
    spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', log)
    registers = re.search(r'Used (\d+) registers', log)
    if spills is None or registers is None:
        raise RuntimeError(f'The assembler refused the kernel for {gpu}: {log.strip()[-500:]}')
    return int(registers.group(1)), int(spills.group(1)) + int(spills.group(2))


def disassemble(cubin: Path) -> str:
    return subprocess.run([_tools() / 'nvdisasm', cubin], capture_output=True, text=True, check=True).stdout


def count_loops(listing: str) -> list[tuple[int, int]]:
    """Instructions and matrix products of each loop in a listing of machine code, the longest loop first."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r'\s*(\.L_\w+):', line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif re.match(r'\s+/\*[0-9a-f]+\*/\s', line):
            instructions.append(line)
    loops = set()
    for number, text in enumerate(instructions):
        jump = re.search(r'\bBRA\b.*`\((\.L_\w+)\)', text)
        # the shortest, of a single jump, are the ends of programs and waits
        if jump and labels.get(jump.group(1), number) < number - 20:
            loops.add((labels[jump.group(1)], number))
    is_product = [re.search(r'\b(?:HMMA|HGMMA|UTCHMMA)\b', text) is not None for text in instructions]
    return sorted(((last - first + 1, sum(is_product[first:last])) for first, last in loops), reverse=True)


def _tools() -> Path:
    import triton
    return Path(os.path.dirname(triton.__file__)) / 'backends' / 'nvidia' / 'bin'
