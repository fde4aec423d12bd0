"""Tiled detection finds the same objects as detection in the whole image."""
import itertools

import pytest
import torch
from detection_helpers import tiny_detector
from torch import nn

from ls_vision.detection import detect
from ls_vision.detection.detectors import Normalize
from ls_vision.detection.tiling import make_tiles


@pytest.mark.parametrize(('height', 'width', 'tile_size', 'overlap'), [
    (100, 300, 64, 16), (64, 64, 64, 0), (65, 64, 64, 63), (2472, 2299, 512, 128), (50, 500, 96, 0),
])
def test_tiles_cover_the_image_and_overlap(height, width, tile_size, overlap):
    covered = torch.zeros(height, width, dtype=torch.int)
    tiles = list(make_tiles(height, width, tile_size, overlap))
    for left, top, right, bottom in tiles:
        assert right - left == min(tile_size, width) and bottom - top == min(tile_size, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    lefts = sorted({tile[0] for tile in tiles})
    assert all(b - a <= tile_size - overlap for a, b in itertools.pairwise(lefts))


@pytest.mark.parametrize('overlap', [64, -1])
def test_overlap_must_be_smaller_than_a_tile(overlap):
    with pytest.raises(ValueError, match=f'overlap {overlap}: must be 0 or more and below the tile size 64'):
        list(make_tiles(100, 100, 64, overlap))


class Blobs(nn.Module):
    """Stands for a perfect detector: a box around every bright rectangle, cut where the image ends."""

    def forward(self, images):
        results = []
        for image in images:
            values = image[0].unique()
            boxes = []
            for value in values[values > 0]:
                rows, columns = torch.where(image[0] == value)
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            results.append(dict(
                boxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), scores=torch.ones(len(boxes)),
                labels=torch.ones(len(boxes), dtype=torch.long)))
        return results


def test_every_object_is_found_once_and_whole():
    """Rectangles everywhere, across the borders of tiles and cores too, none larger than the overlap."""
    image = torch.zeros(3, 333, 500)
    truth = []
    for i in range(60):
        left, top = (i % 10) * 50 + (i * 7) % 13, (i // 10) * 54 + (i * 5) % 11
        width, height = 10 + i % 26, 12 + (i * 3) % 30
        image[:, top:top + height, left:left + width] = (i + 1) / 100
        truth.append([left, top, min(left + width, 500), min(top + height, 333)])
    found = detect(Blobs(), image, tile_size=128, overlap=48, max_dets=100)
    assert sorted(found['boxes'].tolist()) == sorted(map(list, truth))


class LocalFeatures(nn.Module):
    """A pyramid of pooled colours: a feature depends only on its own cell."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 32, 1)

    def forward(self, x):
        return {str(i): self.mix(nn.functional.avg_pool2d(x, 2 ** (3 + i))) for i in range(3)}


def local_detector():
    """A real FCOS: its head sees 5 cells around a point, 160 pixels at the coarsest of strides 8, 16 and 32."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead

    torch.manual_seed(1)
    head = FCOSHead(32, 1, 2)
    for module in head.modules():
        if isinstance(module, nn.GroupNorm):  # takes its statistics from the whole image: no tile could have them
            module.forward = lambda x: x
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(head.regression_head.bbox_reg.weight, std=.01)
    nn.init.constant_(head.regression_head.bbox_reg.bias, 2.)  # boxes of 4 x 4 cells, 128 pixels at the most
    model = FCOS(
        LocalFeatures(), 2, anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.,),) * 3), head=head,
        detections_per_img=10_000, score_thresh=.05, nms_thresh=1., topk_candidates=10_000)
    model.transform = Normalize(0, 0, [.5] * 3, [.5] * 3)
    return model.eval()


def away_from_seams(found):
    """Detections whose centre no rounding can move over the border of a core, in a well-defined order."""
    boxes = found['boxes']
    x, y = (boxes[:, :2] + boxes[:, 2:]).div(2).unbind(1)
    keep = ((x - 448).abs() > 1) & ((x - 640).abs() > 1) & ((y - 384).abs() > 1)
    order = boxes[keep].double().mul(boxes.new_tensor([1, 7, 49, 343])).sum(1).argsort()
    return {name: value[keep][order] for name, value in found.items()}


@pytest.mark.parametrize('batch_size', [1, 3])
def test_tiled_inference_equals_whole_image_inference(batch_size):
    """A detector that sees 160 pixels around a point finds the same in tiles that overlap by more than twice that.

    Before any suppression, which one box beyond a seam can change for a chain of others.
    """
    model = local_detector()
    image = torch.zeros(3, 768, 1024)
    for _ in range(60):
        top, left = int(torch.randint(0, 730, ())), int(torch.randint(0, 990, ()))
        image[:, top:top + 32, left:left + 32] = torch.rand(3, 1, 1)
    model.score_thresh = model([image])[0]['scores'].quantile(0.9).item()  # what stands out from the background
    whole = detect(model, image, max_dets=10_000)
    tiled = detect(model, image, tile_size=640, overlap=384, nms_thresh=1., max_dets=10_000, batch_size=batch_size)
    assert len(list(make_tiles(768, 1024, 640, 384))) == 6
    a, b = (away_from_seams(found) for found in (whole, tiled))
    assert len(a['boxes']) == len(b['boxes']) > 500
    for name in ('boxes', 'scores', 'labels'):
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-3)


def test_small_image_is_taken_whole():
    model = tiny_detector(score_thresh=0.).eval()
    image = torch.rand(3, 160, 256)
    whole, tiled = detect(model, image), detect(model, image, tile_size=256)
    assert len(whole['boxes']) > 0
    assert all(torch.equal(whole[name], tiled[name]) for name in whole)
