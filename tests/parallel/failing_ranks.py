"""Ranks of which the second fails; every other prints or returns how it ended and after how long.

    torchrun --nproc_per_node 3 failing_ranks.py HOW SECONDS FOLDER     HOW: dies, raises, hangs, stops
"""
import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from rank_checks import CASES, space
from strip_cases import build, images

from ls_vision.parallel import parallelize, split_image


def fail(how, seconds):
    mesh, case = space(), CASES['vil']
    case = case._replace(height=56 * dist.get_world_size())
    model = parallelize(build(case), mesh, timeout=seconds)
    strip = split_image(images(case), mesh, 56)
    model(strip)
    if dist.get_rank() == 1:
        model.stages[1].register_forward_pre_hook(lambda module, args: end(how, seconds))
    start = time.monotonic()
    try:
        model(strip)
    except RuntimeError as e:
        return str(e), time.monotonic() - start
    return 'no error', time.monotonic() - start


def end(how, seconds):
    """In the middle of a step."""
    if how == 'dies':
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 'raises':
        raise ValueError('a bad strip')
    if how == 'stops':
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(4 * seconds)
    os._exit(0)


def main():
    how, seconds, folder = sys.argv[1:]
    Path(folder, f'pid.{os.getpid()}').touch()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end the others before they have said anything
    dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=60))
    message, waited = fail(how, float(seconds))
    Path(folder, str(dist.get_rank())).write_text(f'{waited:.0f} {message}')


if __name__ == '__main__':
    main()
