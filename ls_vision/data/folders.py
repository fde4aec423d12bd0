"""Image folders: which folder is which split, and which class has which number."""
import codecs
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data.readers.class_map import load_class_map

from ..runtime.errors import UserError, first_line
from ..runtime.spelling import did_you_mean
from .readers import class_name, is_image

# The names of a split's folder that timm accepts.
SPLIT_FOLDERS = {
    'train': ('train', 'training'),
    'validation': ('val', 'valid', 'validation', 'eval', 'evaluation'),
}
SHOWN = 10  # names in a message


def find_split(data_dir: str, split: str) -> Path:
    """The folder or tar archive of a split.

    Raises:
        UserError: There is none; timm would silently read the whole of `data_dir` instead.
    """
    root = Path(data_dir)
    if root.is_file():
        return root  # a tar archive
    if not root.is_dir():
        raise UserError(f'--data-dir {data_dir} does not exist; it must hold one folder per split, e.g. train and val')
    names = next((names for names in SPLIT_FOLDERS.values() if split in names), ())
    for name in dict.fromkeys((split, *names)):
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    present = ', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'
    raise UserError(
        f'--data-dir {data_dir} has no folder for split {split!r} (looked for {", ".join((split, *names))}); '
        f'it holds {present}')


def is_split(folder: Path, class_names: Sequence[str] | None) -> bool:
    """Whether a folder that is named like a split is one, and not a class: it holds folders, and no images of its own.

    Args:
        folder: E.g. `mine/valid`.
        class_names: Names of the model's classes where they are known.
    """
    if not folder.is_dir() or (class_names is not None and class_name(folder.name) in class_names):
        return False
    content = [path for path in folder.iterdir() if not path.name.startswith('.')]
    return any(path.is_dir() for path in content) and not any(is_image(path.name) for path in content)


def class_to_idx(dataset: Any) -> dict[str, int]:
    """The number of each class by name; empty where timm's reader does not know them."""
    reader = getattr(dataset, 'reader', None)
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}


def class_names(dataset: Any) -> list[str] | None:
    """The classes in the order of their numbers; None where they are not known."""
    if hasattr(dataset, 'classes'):  # torchvision
        return [str(name) for name in dataset.classes]
    return [str(name) for name, _ in sorted(class_to_idx(dataset).items(), key=lambda item: item[1])] or None


def read_class_map(path: str, root: Path) -> dict[str, int]:
    """The number of each class from a text file with a name per line, or a .pkl file of a dict.

    Args:
        path: The file; a relative one may lie in `root`.
        root: Folder of the images.

    Raises:
        UserError: It cannot be read, or a name or number is missing or doubled.
    """
    file = next((p for p in (Path(path), root / path) if p.is_file()), None)
    if file is None:
        raise UserError(f'--class-map {path} does not exist, also not in {root}')
    if file.suffix.lower() == '.pkl':
        return _check_numbers(path, file)
    if file.suffix.lower() != '.txt':
        raise UserError(f'--class-map {path}: expected a .txt file with a class name per line, or a .pkl file')
    lines = [line.strip() for line in _decode(path, file.read_bytes()).rstrip().splitlines()]
    found: dict[str, int] = {}
    for i, line in enumerate(lines):
        name = class_name(line)
        if not name or name in found:
            what = f'{name!r} as in line {found[name] + 1}' if name else 'empty'
            raise UserError(f'--class-map {path}: line {i + 1} is {what}; each line must name another class')
        found[name] = i
    if not found:
        raise UserError(f'--class-map {path} is empty')
    return found


def check_class_map(names: Mapping[str, int], folders: Sequence[str], path: str, root: Path) -> list[str]:
    """Compare a class map with the folders that there are; returns the classes without one.

    Raises:
        UserError: A folder is not in the map; its images would be left out.
    """
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise UserError(
            f'--class-map {path} lacks {len(unknown)} of the class folders of {root}: {shorten(unknown)}'
            f'{did_you_mean(unknown[0], names)}')
    return [name for name in names if name not in folders]


def shorten(names: Sequence[str]) -> str:
    """The first names for a message."""
    return ', '.join(map(repr, names[:SHOWN])) + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '')


def _decode(path: str, content: bytes) -> str:
    encoding = 'utf-16' if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f'--class-map {path} is not UTF-8 or UTF-16: {e}') from e


def _check_numbers(path: str, file: Path) -> dict[str, int]:
    try:
        found = load_class_map(os.fspath(file))  # timm's, which refuses code
        numbers = {class_name(str(name)): int(number) for name, number in found.items()}
    except Exception as e:  # of any damaged pickle
        raise UserError(f'--class-map {path} cannot be read: {first_line(e)}') from e
    if sorted(numbers.values()) != list(range(len(found))):
        raise UserError(f'--class-map {path}: the classes must have the numbers 0 to {len(found) - 1}, each once')
    return numbers
