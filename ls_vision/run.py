"""Runs any script with the models registered: `python -m ls_vision.run path/to/timm/train.py --model vil_ls_small`.

timm has no plugin discovery: a model exists once its module is imported. Child processes of the script know the models
too, e.g. those of timm's bulk_runner.py: `python -m ls_vision.run bulk_runner.py --model-list 'vil_ls*' benchmark.py`.
Works under torchrun: `torchrun --nproc_per_node 2 -m ls_vision.run path/to/timm/train.py ...`. Also installed as
`ls-vision-run`.
"""
import os
import runpy
import sys
from pathlib import Path
from typing import List, Optional

STARTUP = str(Path(__file__).resolve().parent / '_startup')


def main(argv: Optional[List[str]] = None) -> None:
    """Runs the script that the first argument names, as if Python had been called with all arguments."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ('-h', '--help'):
        print('usage: python -m ls_vision.run SCRIPT [ARGUMENT ...]\n\n' + (__doc__ or ''))
        raise SystemExit(0 if args else 2)
    script = args[0]
    if not os.path.isfile(script):
        raise SystemExit(f'ls_vision.run: there is no script {script!r}.')

    import ls_vision.models  # noqa: F401, registers the models

    sys.argv = args
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # scripts import their neighbours
    register_in_children()
    runpy.run_path(script, run_name='__main__')


def register_in_children() -> None:
    """Let every Python process that this one starts register the models when it imports timm."""
    folders = [folder for folder in os.environ.get('PYTHONPATH', '').split(os.pathsep) if folder]
    if STARTUP not in folders:
        os.environ['PYTHONPATH'] = os.pathsep.join([STARTUP, *folders])


if __name__ == '__main__':
    main()
