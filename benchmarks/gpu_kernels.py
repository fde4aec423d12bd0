#!/usr/bin/env python3
"""Registers, spills, shared memory and loops of the Triton kernels, compiled for GPUs that need not be there.

    python benchmarks/gpu_kernels.py --arch 80 90
    python benchmarks/gpu_kernels.py --kernels forward key_gradient --widths 32 64 --windows 7 --loops
    python benchmarks/gpu_kernels.py --widths 16 32 48 64 80 96 128 --windows 2 7 8 12 16 --publish

`loops` are instructions of the longest loops, with the matrix products among them. Triton compiles for sm_80, 86, 89,
90, 100 and 120.
"""
import argparse
import datetime
import itertools
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ls_vision.analysis.compiled_kernels import SHARED_MEMORY, SUM_KERNELS, WINDOW_KERNELS, compile_kernel
from ls_vision.analysis.measure import describe_machine, write
from ls_vision.analysis.tables import markdown

RESULTS = Path(__file__).parent / 'results'


def problems(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Arguments of `compile_kernel`; those that make no difference to a kernel are left out."""
    found = []
    for kernel, arch, dtype, d in itertools.product(args.kernels, args.arch, args.dtypes, args.widths):
        case = dict(kernel=kernel, arch=arch, dtype=getattr(torch, dtype), head_dim=d)
        if kernel in (*SUM_KERNELS, 'additional_gradient'):
            found.append(case)
        else:
            found += [dict(case, window_size=w) for w in args.windows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = (*WINDOW_KERNELS, *SUM_KERNELS)
    parser.add_argument('--kernels', nargs='+', choices=kernels, default=kernels)
    parser.add_argument('--arch', nargs='+', type=int, choices=sorted(SHARED_MEMORY), default=[80, 90])
    parser.add_argument('--dtypes', nargs='+', choices=('bfloat16', 'float16', 'float32'), default=['bfloat16'])
    parser.add_argument('--widths', nargs='+', type=int, default=[32, 64], help='head widths')
    parser.add_argument('--windows', nargs='+', type=int, default=[7])
    parser.add_argument('--loops', action='store_true', help='count the instructions of loops')
    parser.add_argument('--publish', action='store_true', help='write a dated file under benchmarks/results')
    args = parser.parse_args()
    for option, most in (('widths', 128), ('windows', 50)):
        wrong = [value for value in getattr(args, option) if not 1 <= value <= most]
        if wrong:
            parser.error(f'--{option} {wrong[0]}: expected 1 to {most}')
    rows = []
    for case in tqdm(problems(args), disable=None):
        for compiled in compile_kernel(**case, with_loops=args.loops):
            dtype = str(case['dtype']).removeprefix('torch.')
            rows.append({**case, 'dtype': dtype, **compiled._asdict(), 'blocks': list(compiled.blocks)})
    text = markdown(rows, {
        'kernel': lambda row: row['kernel'], 'sm': lambda row: str(row['arch']), 'dtype': lambda row: row['dtype'],
        'd': lambda row: str(row['head_dim']), 'w': lambda row: str(row.get('window_size', '')),
        'block, warps, stages': lambda row: '{} x {}, {}, {}'.format(*row['blocks'][:4]),
        'registers': lambda row: str(row['registers']), 'spilled, B': lambda row: str(row['spilled']),
        'shared, KiB': lambda row: f'{row["shared"] / 1024:.1f}',
        'loops': lambda row: ', '.join(f'{n} ({m})' for n, m in zip(row['loops'], row['products']))})
    print(text)
    bad = [row for row in rows if row['spilled'] or row['shared'] > SHARED_MEMORY[row['arch']]]
    summary = f'{len(rows)} compiled, {len(bad)} of them spill registers or exceed the shared memory'
    print(f'\n{summary}')
    if args.publish:
        path = RESULTS / f'gpu_kernels_{datetime.date.today():%Y-%m-%d}'
        write(path, describe_machine('cpu', ', '.join(args.dtypes), 1), rows, f'{text}\n\n{summary}')


if __name__ == '__main__':
    main()
