"""The metrics equal those of pycocotools, and are also correct where pycocotools is not."""
import contextlib
import io

import numpy as np
import pytest
import torch
from detection_helpers import write_coco

from ls_vision.detection import Annotations, evaluate_detections, read_annotations
from ls_vision.detection.annotations import Annotated
from ls_vision.detection.evaluation import to_coco, to_results


def perturb(annotations, noise, seed=0, false=0.3):
    """Detections: the true boxes with corners moved by normal noise, a share of false ones, and random scores."""
    rng = np.random.default_rng(seed)
    found = {}
    for image in annotations.images:
        boxes = image.boxes + rng.normal(0, noise, image.boxes.shape)
        extra = boxes[rng.random(len(boxes)) < false] + rng.uniform(-200, 200, 4)
        boxes = np.concatenate([boxes, extra])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        found[image.image_id] = dict(
            boxes=torch.from_numpy(boxes), scores=torch.from_numpy(rng.random(len(boxes))),
            labels=torch.ones(len(boxes), dtype=torch.long))
    return found


def by_pycocotools(annotations, found, max_dets, kind='bbox'):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = to_coco(annotations)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(to_results(found, kind)), kind)
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        if max_dets == 100:
            evaluation.summarize()
    return evaluation


@pytest.fixture
def photographs(deepforest):
    """All 914 trees, each photograph an image."""
    parts = [read_annotations(str(deepforest / split)) for split in ('train', 'val', 'transfer')]
    for i, part in enumerate(parts):
        part.images[0].image_id = i + 1
    return Annotations([part.images[0] for part in parts], ['Tree'])


@pytest.fixture
def mosaic(photographs):
    """The same trees in one image, the photographs beside each other."""
    left, boxes = 0, []
    for image in photographs.images:
        boxes.append(image.boxes + np.array([left, 0, left, 0]))
        left += image.width
    joined = np.concatenate(boxes)
    areas = (joined[:, 2] - joined[:, 0]) * (joined[:, 3] - joined[:, 1])
    height = max(image.height for image in photographs.images)
    return Annotations([Annotated(
        photographs.images[0].path, left, height, 1, joined, np.ones(len(joined), dtype=np.int64),
        np.zeros(len(joined), dtype=bool), areas)], ['Tree'])


def test_equals_pycocotools_at_100(photographs):
    found = perturb(photographs, noise=3)
    ours = evaluate_detections(photographs, found, max_dets=100)
    theirs = by_pycocotools(photographs, found, 100).stats
    assert 0.05 < ours['AP'] < 0.5
    for name, index in (('AP', 0), ('AP50', 1), ('AP75', 2), ('AP_small', 3), ('AP_medium', 4), ('AP_large', 5),
                        ('AR_1', 6), ('AR_10', 7), ('AR', 8)):
        assert ours[name] == pytest.approx(theirs[index], abs=1e-6), name


@pytest.mark.parametrize(('fixture', 'at_100'), [('photographs', 0.19), ('mosaic', 0.07)])
def test_914_boxes_beyond_the_limit_of_100(request, fixture, at_100):
    annotations = request.getfixturevalue(fixture)
    assert annotations.num_objects == 914
    found = perturb(annotations, noise=2.45, false=0.)
    capped = evaluate_detections(annotations, found, max_dets=100)['AP']
    right = evaluate_detections(annotations, found, max_dets=1000)['AP']
    print(f'AP {right:.4f} at 1000 detections, {capped:.4f} at 100')
    assert right == pytest.approx(0.58, abs=0.02)
    assert capped == pytest.approx(at_100, abs=0.02)
    # pycocotools computes the right numbers too, but its summary gives -1 for them.
    evaluation = by_pycocotools(annotations, found, 1000)
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    assert right == pytest.approx(precision[precision > -1].mean(), abs=1e-6)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    assert evaluation.stats[0] == -1


def test_perfect_and_absent_detections(photographs):
    perfect = {i.image_id: dict(boxes=torch.from_numpy(i.boxes), scores=torch.ones(len(i.boxes)),
                                labels=torch.from_numpy(i.labels)) for i in photographs.images}
    assert evaluate_detections(photographs, perfect, max_dets=1000)['AP'] == pytest.approx(1.)
    assert evaluate_detections(photographs, {}, max_dets=1000)['AP'] == 0


def test_masks(tmp_path):
    annotations = read_annotations(str(write_coco(tmp_path)))
    found = {}
    for image in annotations.images:
        masks = torch.zeros(len(image.boxes), 1, image.height, image.width)
        for mask, (left, top, right, bottom) in zip(masks, image.boxes.astype(int), strict=True):
            mask[:, top + 1:bottom, left:right] = 1
        found[image.image_id] = dict(
            boxes=torch.from_numpy(image.boxes), scores=torch.rand(len(masks)), labels=torch.from_numpy(image.labels),
            masks=masks)
    ours = evaluate_detections(annotations, found, kind='segm')
    assert ours['AP'] == pytest.approx(by_pycocotools(annotations, found, 100, 'segm').stats[0], abs=1e-6)
    assert 0.5 < ours['AP'] < 1
