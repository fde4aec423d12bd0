"""CIFAR-10: only the published data are accepted, and only complete folders are written."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ls_vision.data.cifar10 import BATCH_SIZE, CLASSES, FetchError, fetch_cifar10, is_complete, verify, write_folder


def make_split(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def test_folder_holds_the_images_losslessly(tmp_path):
    splits = dict(train=make_split(20), val=make_split(5, seed=1))
    write_folder(splits, tmp_path / 'out')
    for split, (images, labels) in splits.items():
        assert len(list((tmp_path / 'out' / split).rglob('*.png'))) == len(images)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            written = Image.open(tmp_path / 'out' / split / CLASSES[label] / f'{i}.png')
            assert np.array_equal(np.asarray(written), image)


def test_other_pixels_are_refused():
    splits = dict(train=make_split(5 * BATCH_SIZE), val=make_split(BATCH_SIZE))
    with pytest.raises(FetchError, match=r'train batch 1: MD5 .* published 5dd7e06a14cb22eb9f671a540d1b7c25'):
        verify(splits)


def test_missing_images_are_refused():
    with pytest.raises(FetchError, match='train: 100 images, 100 labels, expected 5 x 10,000'):
        verify(dict(train=make_split(100), val=make_split(BATCH_SIZE)))


def test_complete_folder_is_recognised_and_left_alone(tmp_path, capsys):
    for split, count in (('train', 5000), ('val', 1000)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                os.close(os.open(tmp_path / split / name / f'{i}.png', os.O_CREAT))
    assert is_complete(tmp_path)
    assert fetch_cifar10(tmp_path) == tmp_path
    assert 'already here' in capsys.readouterr().out
    (tmp_path / 'val' / 'cat' / '7.png').unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(FetchError, match='exists but is not complete CIFAR-10: remove it'):
        fetch_cifar10(tmp_path)


def test_no_source_can_be_reached(tmp_path):
    """Without a network and npm there is one clear error, soon, and no file."""
    environment = dict(os.environ, PATH=str(tmp_path))
    environment.update({name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTPS_PROXY')})
    result = subprocess.run(
        [sys.executable, '-m', 'ls_vision.data.cifar10', '--data-dir', str(tmp_path / 'data' / 'cifar10')],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 1
    assert 'error: CIFAR-10 could not be fetched' in result.stderr
    assert '`npm` is not installed' in result.stderr
    assert 'Traceback' not in result.stderr
    assert not list((tmp_path / 'data').iterdir())
