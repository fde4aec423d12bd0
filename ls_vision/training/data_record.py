"""What a checkpoint knows of the data that it was trained on, so that a resumed run notices other data."""
import hashlib
from collections.abc import Iterable
from typing import Any


def describe_samples(dataset: Any) -> dict[str, Any]:
    """The number of samples and a digest of their names in order.

    Only timm's readers of folders and archives list the names; of others the number alone is known.

    Args:
        dataset: A classifier's training set.
    """
    reader = getattr(getattr(dataset, 'dataset', dataset), 'reader', None)
    names = (dataset.filename(i) for i in range(len(dataset))) if hasattr(reader, 'samples') else ()
    return dict(samples=len(dataset), digest=_digest(name.encode(errors='surrogateescape') for name in names))


def describe_annotations(annotations: Any) -> dict[str, Any]:
    """The same of annotated images, with their objects.

    Args:
        annotations: `ls_vision.detection.Annotations`.
    """
    parts = (
        part for image in annotations.images
        for part in (image.path.name.encode(errors='surrogateescape'), image.boxes.tobytes(), image.labels.tobytes()))
    return dict(samples=len(annotations.images), digest=_digest(parts))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, 'little') + part)
    return digest.hexdigest()
