"""examples/huge_image.py reads strips of files, and its map is that of one process."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

sys.path.insert(0, str(Path(__file__).parents[2] / 'examples'))

import huge_image

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    'memory-mapped': dict(),
    'strips': dict(rowsperstrip=13, compression='zlib'),
    'tiles': dict(tile=(32, 48), compression='zlib'),
}


def write(path, height=75, width=61, **kwargs):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, photometric='rgb', **kwargs)
    return pixels


@pytest.mark.parametrize('layout', LAYOUTS)
def test_strips_are_those_of_the_image(tmp_path, layout):
    pixels = write(tmp_path / 'a.tif', **LAYOUTS[layout])
    strips = [huge_image.read_strip(str(tmp_path / 'a.tif'), rank, 2, 32) for rank in range(2)]
    assert [len(strip) for strip in strips] == [64, 11]
    np.testing.assert_array_equal(np.concatenate(strips), pixels)


def test_other_files_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', np.zeros((40, 40), np.uint16))
    with pytest.raises(SystemExit, match='uint16 of shape'):
        huge_image.read_strip(str(tmp_path / 'a.tif'), 0, 1, 32)
    (tmp_path / 'b.tif').write_bytes(b'text')
    for image, out, message in (
            ('a.tif', 'map.npy', 'uint16 of shape'),
            ('b.tif', 'map.npy', 'b.tif is no TIFF that can be read: not a TIFF'),
            ('c.tif', 'map.npy', 'c.tif is no TIFF that can be read: .*No such file'),
            ('a.tif', 'nowhere/map.npy', 'there is no folder')):
        with pytest.raises(SystemExit, match=message):
            huge_image.main([str(tmp_path / image), str(tmp_path / out)])


@pytest.mark.slow
def test_two_processes_give_the_map_of_one(tmp_path):
    write(tmp_path / 'a.tif', 500, 230, tile=(64, 64), compression='zlib')
    maps = []
    for ranks in (1, 2):
        command = ['-m', 'torch.distributed.run', '--nproc_per_node', str(ranks), '--master_port', str(29600 + ranks)]
        out = str(tmp_path / f'{ranks}.npy')
        subprocess.run(
            [sys.executable, *command, 'examples/huge_image.py', str(tmp_path / 'a.tif'), out], check=True, cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT)), timeout=200)
        maps.append(np.load(out))
    assert maps[0].shape == (384, 16, 8)
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-5 * np.abs(maps[0]).max())
