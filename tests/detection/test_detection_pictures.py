"""The picture shows correct, false and missed boxes."""
import numpy as np
import torch
from detection_helpers import write_coco
from PIL import Image

from ls_vision.detection import read_annotations
from ls_vision.detection.pictures import FALSE, FOUND, MISSED, draw_detections


def test_right_wrong_and_missed(tmp_path):
    image = read_annotations(str(write_coco(tmp_path))).images[0]
    boxes = torch.from_numpy(image.boxes).float()
    found = dict(
        # right; right again, which counts as wrong; of the wrong class; too weak to be drawn
        boxes=torch.cat([boxes[:1], boxes[:1] + 1, boxes[1:2], boxes[2:]]),
        scores=torch.tensor([.9, .8, .7, .1]),
        labels=torch.tensor([image.labels[0], image.labels[0], 3 - image.labels[1], image.labels[2]]))
    assert draw_detections(image, found, tmp_path / 'picture.png') == dict(found=1, false=2, missed=2)
    pixels = np.asarray(Image.open(tmp_path / 'picture.png'))
    assert pixels.shape == (image.height + 24, image.width, 3)
    drawn = {f'#{r:02x}{g:02x}{b:02x}' for r, g, b in pixels[24:].reshape(-1, 3)}
    assert {FOUND, FALSE, MISSED} <= drawn


def test_no_detection_and_no_object(tmp_path):
    image = read_annotations(str(write_coco(tmp_path))).images[0]
    nothing = dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))
    assert draw_detections(image, nothing, tmp_path / 'a.png') == dict(found=0, false=0, missed=3)
    one = dict(boxes=torch.tensor([[1., 1., 9., 9.]]), scores=torch.ones(1), labels=torch.ones(1, dtype=torch.long))
    image.boxes, image.labels = image.boxes[:0], image.labels[:0]
    assert draw_detections(image, one, tmp_path / 'a.png') == dict(found=0, false=1, missed=0)
