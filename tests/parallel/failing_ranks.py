"""Ranks of which one fails; every other returns how it ended and after how long."""
import os
import time

import torch.distributed as dist
from rank_checks import CASES, space
from strip_cases import build, images

from ls_vision.parallel import parallelize, split_image


def fail(how, seconds):
    mesh, case = space(), CASES['vil']
    model = parallelize(build(case), mesh, timeout=seconds)
    strip = split_image(images(case), mesh, 56)
    model(strip)
    if dist.get_rank() == 1:
        if how == 'dies':
            os._exit(0)
        time.sleep(3 * seconds)  # hangs
        os._exit(0)
    start = time.monotonic()
    try:
        model(strip)
    except RuntimeError as e:
        return str(e), time.monotonic() - start
    return 'no error', time.monotonic() - start
