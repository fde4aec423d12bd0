"""Command lines with a YAML file: `--config` names it, its values become the defaults, the command line wins.

A name or value that is not known is an error that says what would be accepted.
"""
import argparse
import ast
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import write_text
from .spelling import did_you_mean

TAKE_NONE = ('color_jitter',)  # numbers with a value by default, of which timm takes None for none


class _Loader(yaml.SafeLoader):
    """Reads 1e-8 as a number, as YAML 1.2 does; PyYAML's YAML 1.1 wants 1.0e-8 and takes the rest for text."""


class _Dumper(yaml.SafeDumper):
    """Puts text that looks like such a number into quotes."""


_EXPONENTIAL = re.compile(r'[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$')
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver('tag:yaml.org,2002:float', _EXPONENTIAL, list('-+.0123456789'))


class KeyValues(argparse.Action):
    """Reads NAME=VALUE ... as a dict. A value is a Python literal, true or false, or else text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = {}
        for text in filter(None, values):
            name, equals, value = text.partition('=')
            if not equals or not name:
                parser.error(f'argument {option_string}: {text!r} is not NAME=VALUE')
            found[name] = _literal(value)
        setattr(namespace, self.dest, found)


def _literal(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def positive_int(text: str) -> int:
    """The value of an argument that must be 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number of 1 or more')
    return int(text)


def positive_number(text: str) -> float:
    """The value of an argument that must be above 0 and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a number above 0')
    return value


LARGEST_SIDE = 1_000_000  # tensors of much larger images have more elements than can be counted


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of '224' or '640x480'.

    Raises:
        UserError: The text is neither.
    """
    numbers = text.lower().split('x')
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f'image size {text!r}: expected pixels, as 224 or as HEIGHTxWIDTH, 640x480')
    if any(int(number) > LARGEST_SIDE for number in numbers):
        raise UserError(f'image size {text!r}: expected at most {LARGEST_SIDE:,} pixels a side')
    return int(numbers[0]), int(numbers[-1])


_UNITS = dict(MiB=2 ** 20, GiB=2 ** 30, TiB=2 ** 40, MB=10 ** 6, GB=10 ** 9, TB=10 ** 12)


def parse_memory(text: str, option: str) -> int:
    """Bytes of '24GiB' or '500 MB'.

    Raises:
        UserError: The text is no number above 0 with a unit.
    """
    match = re.fullmatch(rf'([0-9]+(?:\.[0-9]+)?) ?({"|".join(_UNITS)})', text.strip())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f'{option} {text}: expected a number above 0 and its unit, {", ".join(_UNITS)}; as 24GiB')
    return size


def create_config_parser() -> argparse.ArgumentParser:
    """A parser of `--config` alone, to be a parent of a script's parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of default arguments')
    return parser


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the file that `--config` names, then the command line, which wins."""
    config_args, remaining = create_config_parser().parse_known_args(argv)
    if config_args.config:
        parser.set_defaults(**read_config(config_args.config, parser))
    args = parse_strictly(parser, remaining)
    del args.config  # the other arguments hold its values
    return args


def parse_strictly(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; an unknown argument is an error that suggests a known one."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f'unknown argument {unknown[0]}{did_you_mean(unknown[0].split("=")[0], options)}')
    return args


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML file of arguments and check its names and types against the parser's."""
    try:
        config = yaml.load(Path(path).read_text(encoding='utf-8'), _Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'--config {path} cannot be read: {e}') from e
    except yaml.YAMLError as e:
        raise UserError(f'--config {path} is not valid YAML: {e}') from e
    if not isinstance(config, dict):
        raise UserError(f'--config {path} must hold `name: value` lines, found {type(config).__name__}')

    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    for name, value in config.items():
        if name not in actions:
            raise UserError(f'{path}: unknown argument {name!r}{did_you_mean(str(name), actions)}')
        _check_type(path, actions[name], value)
    return config


def save_args(args: argparse.Namespace, path: Path) -> None:
    """Write the arguments as a file that `--config` reads back."""
    write_text(path, yaml.dump(vars(args), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _check_type(path: str, action: argparse.Action, value: Any) -> None:
    """argparse converts and checks only strings; YAML gives typed values."""
    if isinstance(value, str) and action.type is not None:
        return
    is_text = action.type in (None, str) and action.nargs in (None, '?')
    if value is None and (action.default is None or is_text or action.dest in TAKE_NONE):
        return
    if isinstance(action, argparse._StoreTrueAction):
        ok, expected = isinstance(value, bool), 'true or false'
    elif isinstance(action, KeyValues):
        ok, expected = isinstance(value, dict), '`name: value` lines'
    elif action.nargs in ('+', 2):
        ok, expected = isinstance(value, list) and all(_is_number(v) for v in value), 'a list of numbers'
        if ok and action.nargs == 2:
            ok, expected = len(value) == 2, 'a list of two numbers'
    elif action.type is int:
        ok, expected = _is_number(value) and value == int(value), 'an integer'
    elif action.type is float:
        ok, expected = _is_number(value), 'a number'
    elif action.choices is not None:
        ok, expected = value in action.choices, 'one of ' + ', '.join(map(str, action.choices))
    else:
        ok, expected = isinstance(value, str), 'text'
    if not ok:
        raise UserError(f'{path}: {action.dest}: {value!r} is not {expected}')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
