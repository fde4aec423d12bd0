"""ImageNet and its variants: the class of each folder, the classes that count, and the metrics.

    val     ILSVRC 2012 validation, 1000 folders
    real    the same images with the labels of Beyer et al., arXiv 2006.07159 (several or none for an image)
    v2      Recht et al., arXiv 1902.10811, folders named 0 to 999
    a, r    Hendrycks et al., arXiv 1907.07174 and 2006.16241: 200 classes each, other logits are ignored
    sketch  Wang et al., arXiv 1905.13549
    c       Hendrycks and Dietterich, arXiv 1903.12261, folders <corruption>/<severity>/<class>
"""
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from ..data.folders import shorten
from ..runtime.errors import UserError
from .predictions import Predictions

VARIANTS = ('val', 'real', 'v2', 'a', 'r', 'sketch', 'c')
SEVERITIES = (1, 2, 3, 4, 5)
NUM_CLASSES = 1000

# AlexNet's top-1 error, mean over severities, from the authors' github.com/hendrycks/robustness
ALEXNET_ERRORS = {
    'gaussian_noise': .886428, 'shot_noise': .894468, 'impulse_noise': .922640,
    'defocus_blur': .819880, 'glass_blur': .826268, 'motion_blur': .785948, 'zoom_blur': .798360,
    'snow': .866816, 'frost': .826572, 'fog': .819324, 'brightness': .564592,
    'contrast': .853204, 'elastic_transform': .646056, 'pixelate': .717840, 'jpeg_compression': .606500,
}


def subset(variant: str) -> Tensor | None:
    """The ImageNet classes of a variant, in order; None for all."""
    if variant not in ('a', 'r'):
        return None
    return torch.tensor([int(line) for line in _timm_file(f'imagenet_{variant}_indices.txt').split()])


def class_map(
        folders: Iterable[str],
        num_classes: int,
        classes: Tensor | None = None,
        class_names: Sequence[str] | None = None,
) -> dict[str, int]:
    """The target of each class folder.

    Folders are matched with the names of the model's classes, so that some may be missing. Where the names are not
    known, the folders of a model of 1000 classes may be named by WordNet ids or numbers of ImageNet classes. Any other
    folders are numbered in timm's order, and there must be one for each of the model's classes.

    Args:
        folders: Names of class folders, in timm's order.
        num_classes: Number of the model's classes.
        classes: Classes of the dataset; targets are indices into this list.
        class_names: Names of the model's classes, from its checkpoint.

    Raises:
        UserError: A folder belongs to no class.
    """
    folders = list(folders)
    synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())} if num_classes == NUM_CLASSES else {}
    known = {name: i for i, name in enumerate(class_names or ())}
    if known and all(name in known for name in folders):
        numbers = {name: known[name] for name in folders}
    elif known and list(known) != list(synsets):
        unknown = [name for name in folders if name not in known]
        raise UserError(
            f'{len(unknown)} of {len(folders)} class folders, e.g. {unknown[:3]}, are not among the {len(known)} '
            f'classes of the checkpoint: {shorten(list(known))}')
    elif synsets and all(name in synsets for name in folders):
        numbers = {name: synsets[name] for name in folders}
    elif synsets and all(name.isdecimal() and int(name) < num_classes for name in folders):
        numbers = {name: int(name) for name in folders}
    elif len(folders) == num_classes:
        numbers = {name: i for i, name in enumerate(folders)}
    else:
        raise UserError(
            f'{len(folders)} class folders, e.g. {folders[:3]}, are neither all named by WordNet ids or numbers of '
            f'ImageNet classes nor as many as the model has classes, {num_classes}, which the checkpoint does not '
            f'name: pass --num-classes {len(folders)} for a model of them')
    if classes is None:
        return numbers
    places = {int(number): place for place, number in enumerate(classes)}
    foreign = [name for name, number in numbers.items() if number not in places]
    if foreign:
        raise UserError(f'{foreign[:3]} are not among the {len(places)} classes of this variant')
    return {name: places[number] for name, number in numbers.items()}


def real_labels() -> dict[str, list[int]]:
    """Valid classes by file name of the validation images; empty where the raters found none."""
    labels = json.loads(_timm_file('imagenet_real_labels.json'))
    return {f'ILSVRC2012_val_{i + 1:08d}.JPEG': found for i, found in enumerate(labels)}


def real_accuracy(predictions: Predictions, names: Iterable[str]) -> dict[str, float]:
    """Top-1 and top-5 in percent by ReaL labels, over the images that have any; unreadable ones count as wrong.

    Args:
        predictions: For validation images.
        names: Their file names.

    Raises:
        UserError: A name is not one of a validation image.
    """
    labels = real_labels()
    top1 = top5 = images = unreadable = 0
    for name, top, target in zip(names, predictions.top.tolist(), predictions.targets.tolist(), strict=True):
        if name not in labels:
            raise UserError(f'{name} is not named like an ImageNet validation image, ILSVRC2012_val_00000001.JPEG')
        if not labels[name]:
            continue
        images += 1
        unreadable += target < 0
        top1 += top[0] in labels[name]
        top5 += any(found in labels[name] for found in top)
    return dict(top1=100 * top1 / max(1, images), top5=100 * top5 / max(1, images), images=images,
                unreadable=unreadable)


def corruption_folders(root: Path) -> dict[tuple[str, int], Path]:
    """The folders of ImageNet-C, by corruption and severity.

    Folders may also lie one level deeper (`noise/gaussian_noise/1`), as in the published archives.

    Raises:
        UserError: One is missing.
    """
    found = {}
    for corruption in ALEXNET_ERRORS:
        parents = [path for path in (root / corruption, *sorted(root.glob(f'*/{corruption}'))) if path.is_dir()]
        for severity in SEVERITIES:
            path = parents[0] / str(severity) if parents else root / corruption / str(severity)
            if not path.is_dir():
                raise UserError(f'{path} does not exist; mCE needs {len(ALEXNET_ERRORS)} corruptions x 5 severities')
            found[corruption, severity] = path
    return found


def mean_corruption_error(top1: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Corruption errors relative to AlexNet's in percent, and their mean, `mce`.

    Args:
        top1: Top-1 in percent by corruption and severity.
    """
    errors = {
        corruption: sum(100 - top1[corruption, severity] for severity in SEVERITIES) / len(SEVERITIES) / alexnet
        for corruption, alexnet in ALEXNET_ERRORS.items()}
    return {'mce': sum(errors.values()) / len(errors), **errors}


def _timm_file(name: str) -> str:
    return (files('timm.data') / '_info' / name).read_text(encoding='utf-8')
