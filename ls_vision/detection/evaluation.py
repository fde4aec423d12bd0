"""COCO's metrics by faster-coco-eval, which also handles images with more than 100 objects.

pycocotools caps an image at 100 detections and returns -1 for any other limit.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import UserError
from .annotations import Annotations

INSTALL_HINT = 'faster-coco-eval is missing; install it with: pip install ls_vision[detection]'

Detections = dict[str, Tensor]  # boxes (N, 4), scores (N,), labels (N,) and, of Mask R-CNN, masks (N, 1, H, W)


def evaluate_detections(
        annotations: Annotations,
        detections: Mapping[int, Detections],
        max_dets: int = 100,
        kind: str = 'bbox',
) -> dict[str, float]:
    """Average precision and recall as COCO defines them.

    Args:
        annotations: The ground truth; all of its images count.
        detections: Detections in each image, by its id.
        max_dets: Detections per image that count, the best first. The usual 100 hides objects of crowded images.
        kind: 'bbox', or 'segm' for masks.

    Returns:
        AP (mean over IoU 0.5 to 0.95), AP50, AP75, AP of small, medium and large objects, and recall AR at 1, 10 and
        `max_dets` detections, from 0 to 1; -1 where there is no such object.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as e:
        raise UserError(INSTALL_HINT) from e

    truth = COCO(to_coco(annotations))
    results = to_results(detections, kind)
    found = truth.loadRes(results) if results else COCO({**to_coco(annotations), 'annotations': []})
    evaluation = COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
    # COCOeval computes most of its metrics at the last of three limits.
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.run()
    names = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR_1', 'AR_10', 'AR')
    return {name: float(value) for name, value in zip(names, evaluation.stats, strict=False)}


def to_coco(annotations: Annotations) -> dict[str, list[dict[str, Any]]]:
    """The ground truth as the content of a COCO file."""
    objects: list[dict[str, Any]] = []
    for image in annotations.images:
        for i, (left, top, right, bottom) in enumerate(image.boxes.tolist()):
            objects.append(dict(
                id=len(objects) + 1,
                image_id=image.image_id,
                category_id=int(image.labels[i]),
                bbox=[left, top, right - left, bottom - top],
                area=float(image.areas[i]),
                iscrowd=int(image.crowd[i])))
            if image.segmentations is not None:
                objects[-1]['segmentation'] = image.segmentations[i]
    return dict(
        images=[dict(id=image.image_id, file_name=image.path.name, width=image.width, height=image.height)
                for image in annotations.images],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(annotations.class_names)],
        annotations=objects)


def to_results(detections: Mapping[int, Detections], kind: str = 'bbox') -> list[dict[str, Any]]:
    """Detections in COCO's results format."""
    results = []
    for image_id, found in detections.items():
        masks = _encode(found['masks']) if kind == 'segm' else None
        for i, (left, top, right, bottom) in enumerate(found['boxes'].double().tolist()):
            result = dict(
                image_id=image_id,
                category_id=int(found['labels'][i]),
                bbox=[left, top, right - left, bottom - top],
                score=float(found['scores'][i]))
            if masks is not None:
                result['segmentation'] = masks[i]
            results.append(result)
    return results


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Run lengths of masks (N, 1, H, W) from 0 to 1."""
    from faster_coco_eval.core import mask as coco_mask

    return [coco_mask.encode(np.asfortranarray(m.cpu().numpy())) for m in (masks[:, 0] > .5).to(torch.uint8)]
