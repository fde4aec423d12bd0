"""A rank of test_two_hosts.py: exactness over the link, then steps until the link is cut.

    torchrun ... two_hosts.py FOLDER
"""
import sys
import time
from pathlib import Path

import torch.distributed as dist
from rank_checks import CASES, space
from strip_cases import build, compare, images

from ls_vision.parallel import parallelize, split_image


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group('gloo')
    mesh, rank = space(), dist.get_rank()
    wrong = {key: pair for key, pair in compare(CASES['vil'], mesh).items() if not pair[0] < pair[1]}
    (folder / f'wrong {rank}').write_text(repr(wrong))
    model = parallelize(build(CASES['vil']), mesh)
    strip = split_image(images(CASES['vil']), mesh, 56)
    step, start = 0, time.monotonic()
    try:
        while True:
            start = time.monotonic()
            model(strip).sum().backward()
            step += 1
            (folder / f'step {rank}').write_text(str(step))
    except RuntimeError as e:
        (folder / f'end {rank}').write_text(f'{time.monotonic() - start:.0f} {e}')
        raise


if __name__ == '__main__':
    main()
