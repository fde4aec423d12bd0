"""Runs any script with the models registered: `python -m ls_vision.run path/to/timm/train.py --model vil_ls_small`.

timm has no plugin discovery, a model exists once its module is imported. Works under torchrun as well:
`torchrun --nproc_per_node 2 -m ls_vision.run path/to/timm/train.py ...`. Also installed as `ls-vision-run`.
"""
import os
import runpy
import sys
from typing import List, Optional

import ls_vision  # noqa: F401, registers the models


def main(argv: Optional[List[str]] = None) -> None:
    """Runs the script that the first argument names, as if Python had been called with it and the others."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ('-h', '--help'):
        print('usage: python -m ls_vision.run SCRIPT [ARGUMENT ...]\n\n' + (__doc__ or ''))
        raise SystemExit(0 if args else 2)
    script = args[0]
    if not os.path.isfile(script):
        raise SystemExit(f'ls_vision.run: there is no script {script!r}.')
    sys.argv = args
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # scripts import their neighbours
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
