"""Real gloo processes for tests: several ranks run one function, and their results come back."""
import datetime
import multiprocessing
import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PRELOADED = ['torch', 'timm', 'ls_vision', 'ls_vision.parallel', 'torch.distributed.tensor', 'torch.distributed.fsdp']


def run_ranks(function, num_ranks, *args, timeout=200):
    """What `function(*args)` returns on each of `num_ranks` processes of one gloo group; None where one exits before.

    The processes are forks of one that has imported everything, which is what takes time.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(target=_run, args=(function, rank, num_ranks, port, folder, args), daemon=True)
            for rank in range(num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            if process.is_alive():
                process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob('*.txt'))]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * num_ranks, f'exit codes {codes}\n' + '\n'.join(errors)
        paths = [Path(f'{folder}/{rank}.pt') for rank in range(num_ranks)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _run(function, rank, num_ranks, port, folder, args):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    try:
        dist.init_process_group(
            'gloo', rank=rank, world_size=num_ranks, timeout=datetime.timedelta(seconds=60))
        result = function(*args)
        torch.save(result, f'{folder}/{rank}.pt')
        dist.destroy_process_group()
    except BaseException:
        Path(f'{folder}/{rank}.txt').write_text(f'rank {rank}:\n{traceback.format_exc()}')
        raise
