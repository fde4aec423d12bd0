"""Data, sharded and tensor parallel training on two processes: gradients of the whole batch in one.

`sharded.py` is what each process runs.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import each_model

WORKER = Path(__file__).with_name('sharded.py')


@pytest.mark.slow
@pytest.mark.item('DDP, FSDP1, FSDP2, tensor parallel MLPs: gradients and outputs as in one process')
@pytest.mark.parametrize('how', ['ddp', 'fsdp1', 'fsdp2', 'tensor'])
@each_model()
def test_parallel(name, how):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(WORKER), how, name],
        env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count('agreed') == 2
