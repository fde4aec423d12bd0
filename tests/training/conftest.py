"""A tiny image folder and a tiny model, so that the real script runs end to end in seconds."""
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts lie beside the package, not in it

from training_helpers import write_images

from ls_vision.analysis import pictures


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """16 training and 8 test images of two classes."""
    write_images(tmp_path / 'data' / 'train', 8)
    write_images(tmp_path / 'data' / 'val', 4, seed=1)
    return tmp_path / 'data'


@pytest.fixture
def config(tmp_path: Path, image_folder: Path) -> Path:
    """A config file for a ViL-LS of a few thousand parameters on that folder."""
    values = dict(
        data_dir=str(image_folder),
        model='vil_ls_tiny',
        model_kwargs=dict(
            img_size=32, patch_size=4, embed_dims=[8, 16, 16, 16], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1],
            window_size=2, rank=3,
        ),
        img_size=32,
        batch_size=8,
        workers=0,
        opt='adamw',
        lr=1e-3,
        epochs=2,
        warmup_epochs=0,
        sched_on_updates=True,
        color_jitter=None,
        device='cpu',
        output=str(tmp_path / 'output'),
        experiment='run',
    )
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of a tiny run's time; only tests with 'picture' or 'end_to_end' in their name draw them."""
    if 'picture' not in request.node.name and 'end_to_end' not in request.node.name:
        monkeypatch.setattr(pictures, 'is_available', lambda: False)
