"""The course of a script, from its command line to its exit code."""
import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import UserError
from .processes import Processes, join_processes
from .streams import prepare_streams

Result = TypeVar('Result')


def run_script(
        parse: Callable[[Sequence[str] | None], argparse.Namespace],
        job: Callable[[argparse.Namespace, Processes], Result],
        argv: Sequence[str] | None,
) -> Result:
    """What every script's `main` does: parse, join the other processes, do the job. A UserError is printed as one line.

    Args:
        parse: Makes checked arguments, `device` among them, of a command line.
        job: Does the work.
        argv: Command line without the program's name; None reads `sys.argv`.
    """
    prepare_streams()
    try:
        args = parse(argv)
        processes = join_processes(args.device)
        try:
            return job(args, processes)
        finally:
            processes.close()
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
