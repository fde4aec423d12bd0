"""Image folders as timm reads them: which folder is which split, and which class has which number."""
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError

# The names of a split's folder that timm accepts.
SPLIT_FOLDERS = {
    'train': ('train', 'training'),
    'validation': ('val', 'valid', 'validation', 'eval', 'evaluation'),
}


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


def class_to_idx(dataset: Any) -> dict[str, int]:
    """The number of each class by name; empty where timm's reader does not know them."""
    reader = getattr(dataset, 'reader', None)
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
