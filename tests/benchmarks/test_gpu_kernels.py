"""The table of compiled kernels."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton')

from ls_vision.analysis.compiled_kernels import compile_kernel, count_loops

ROOT = Path(__file__).parents[2]


def test_loops_of_a_listing():
    body = '\n'.join(f'        /*{i:04x}*/  {"HMMA.16816" if i == 9 else "FADD"} R1, R2, R3 ;' for i in range(25))
    jump = '        /*0190*/  @P0 BRA `(.L_x_1) ;'
    assert count_loops(f'.L_x_1:\n{body}\n{jump}\n') == [(26, 1)]
    assert count_loops(f'{body}\n.L_x_1:\n        /*0180*/  FADD R1, R2, R3 ;\n{jump}\n') == []  # too short


def test_loops_of_a_kernel():
    """The walk over keys, once for tiles at the edges and once for the others, both with all matrix products."""
    compiled, = compile_kernel('query_gradient', 86, torch.bfloat16, 32, with_loops=True)
    assert len(compiled.loops) >= 2 and compiled.spilled == 0
    assert compiled.loops[1] < compiled.loops[0] and compiled.products[0] == compiled.products[1] > 0


@pytest.mark.slow
def test_command():
    command = [sys.executable, 'benchmarks/gpu_kernels.py', '--kernels', 'merge', '--arch', '80', '--widths', '16']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and '1 compiled, 0 of them spill' in run.stdout, json.dumps([run.stdout, run.stderr])
