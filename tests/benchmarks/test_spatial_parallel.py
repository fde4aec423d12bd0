"""The formulas of benchmarks/spatial_parallel.py, and its table and plot of them."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import spatial_parallel


@pytest.fixture(scope='module')
def layers():
    return spatial_parallel.layers_of('vil_ls_tiny_linear')


def test_bytes_of_strips_and_of_a_ring(layers):
    strips = spatial_parallel.strip_bytes(layers, 1024, 2)
    # tokens across, channels and layers of each stage; 3 rows of keys and values for one neighbour
    numbers = sum(2 * 3 * W * C * n for W, C, n in ((256, 48, 1), (128, 96, 1), (64, 192, 9), (32, 384, 1)))
    assert strips['window halo'] == 4 * numbers
    assert spatial_parallel.strip_bytes(layers, 1024, 4)['window halo'] == 8 * numbers
    assert sum(spatial_parallel.strip_bytes(layers, 1024, 1).values()) == 0
    keys_and_values = 4 * sum(2 * W * W * C * n for W, C, n in ((256, 48, 1), (128, 96, 1), (64, 192, 9), (32, 384, 1)))
    assert spatial_parallel.ring_bytes(layers, 1024, 1024, 4) == 3 / 4 * keys_and_values


def test_plot_of_what_is_on_paper(layers, tmp_path):
    rows = spatial_parallel.paper(layers)
    assert {row['pixels'] for row in rows} == {10 ** e for e in (6, 7, 8, 9)}
    assert max(row['devices'] for row in rows if row['pixels'] == 10 ** 9) == 64
    spatial_parallel.draw(dict(paper=rows), tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10_000
