"""The command `ls-vision`: lists models, measures their cost, draws their attention, and checks this machine."""
import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Optional

from ls_vision import export
from ls_vision.analysis.commands import attention, bench, choose, doctor, flops, models, scale
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.streams import prepare_streams, silence

# None imports torch before it runs, so that help and errors of arguments come at once.
# Each is a module with `add_arguments(parser)` and `run(args)`; its docstring is the help, with examples.
COMMANDS = dict(
    models=models, choose=choose, flops=flops, bench=bench, scale=scale, attention=attention, export=export,
    doctor=doctor)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs a subcommand; exits with 2 for wrong input and with 130 if interrupted."""
    prepare_streams()
    try:
        args = parse_args(argv)
        import ls_vision.models  # noqa: F401  (registers the models)

        args.run(args)
        sys.stdout.flush()
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # e.g. `| head`: nobody reads on
        silence(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        sys.exit(130)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='ls-vision', description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ''
        subparser = commands.add_parser(
            name, help=text.split('.')[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser.parse_args(argv)
