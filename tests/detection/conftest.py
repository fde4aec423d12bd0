"""The photographs with boxes around trees, fetched once."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts lie beside the package, not in it

from ls_vision.data.deepforest import fetch_deepforest


@pytest.fixture(scope='session')
def deepforest() -> Path:
    """Folder with `train`, `val` and `transfer`; the one of `make demo-detection` where that has run."""
    return fetch_deepforest(Path(__file__).parents[2] / 'data' / 'deepforest')
