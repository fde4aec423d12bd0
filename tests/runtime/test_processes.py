"""What two gloo processes, and one alone, learn from each other."""
import subprocess
import sys

import torch

from ls_vision.runtime.processes import Processes

SCRIPT = '''
import sys
import torch
from ls_vision.runtime.processes import join_processes

processes = join_processes('cpu')
rank = processes.rank
norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(1 + rank)
processes.share_buffers(norm)
found = processes.max(rank, -rank), processes.sum(torch.tensor([rank, 1])).tolist(), processes.gather(f'rank {rank}')
print(found, norm.running_mean.tolist(), processes.is_primary, file=open(f'{sys.argv[1]}/{rank}', 'w'))
processes.close()
'''


def test_two_processes(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         str(tmp_path / 'script.py'), str(tmp_path)], check=True, capture_output=True)
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text().strip() == (
            f"([1.0, 0.0], [1, 2], ['rank 0', 'rank 1']) [1.0, 1.0] {rank == 0}")


def test_one_process():
    alone = Processes(torch.device('cpu'))
    assert alone.is_primary and alone.max(3, -1) == [3, -1] and alone.gather('x') == ['x']
    assert alone.device_ids is None
