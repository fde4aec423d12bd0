"""Pictures of detections, compared with the ground truth."""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou

from ..data.images import read_image
from .annotations import Annotated
from .evaluation import Detections

FOUND, FALSE, MISSED = '#39d353', '#ff453a', '#ffd60a'


def draw_detections(
        image: Annotated,
        found: Detections,
        path: Path,
        score_thresh: float = .3,
        iou_thresh: float = .5,
) -> dict[str, int]:
    """Draw correct detections, false detections and missed objects over the image.

    Args:
        image: The image and its objects.
        found: Its detections.
        path: File to write.
        score_thresh: Weaker detections are not drawn.
        iou_thresh: Overlap with an object of the same class from which a detection is correct.

    Returns:
        The numbers of `found`, `false` and `missed` boxes.
    """
    keep = found['scores'] >= score_thresh
    boxes, labels = found['boxes'][keep].cpu(), found['labels'][keep].cpu()
    truth, true_labels = torch.from_numpy(image.boxes).float(), torch.from_numpy(image.labels)
    matched = match(boxes, labels, truth, true_labels, iou_thresh)
    right = matched >= 0
    missed = torch.ones(len(truth), dtype=torch.bool)
    missed[matched[right]] = False
    counts = dict(found=int(right.sum()), false=int((~right).sum()), missed=int(missed.sum()))

    picture = read_image(image.path, size=(image.width, image.height))
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 600))
    for group, color in ((truth[missed], MISSED), (boxes[~right], FALSE), (boxes[right], FOUND)):
        for box in group.tolist():
            draw.rectangle(box, outline=color, width=line)
    _add_legend(picture, counts, score_thresh, iou_thresh).save(path)
    return counts


def picture_names(images: Sequence[Annotated]) -> list[str]:
    """A file name for the picture of each image: that of the image, with its id where several would be the same."""
    stems = [image.path.stem for image in images]
    shared = Counter(stem.lower() for stem in stems)  # lower: not all file systems tell A.png from a.png
    return [f'{stem}.png' if shared[stem.lower()] == 1 else f'{stem}-{image.image_id}.png'
            for stem, image in zip(stems, images, strict=True)]


def match(boxes: Tensor, labels: Tensor, truth: Tensor, true_labels: Tensor, iou_thresh: float) -> Tensor:
    """For each box, the best first, the index of the object that it matches, or -1; an object is matched once."""
    matched = torch.full((len(boxes),), -1, dtype=torch.long)
    if len(truth) == 0:
        return matched
    overlap = box_iou(boxes, truth) * (labels[:, None] == true_labels)
    for i in range(len(boxes)):
        best = int(overlap[i].argmax())
        if overlap[i, best] >= iou_thresh:
            matched[i] = best
            overlap[:, best] = 0.
    return matched


def _add_legend(picture: Image.Image, counts: dict[str, int], score_thresh: float, iou_thresh: float) -> Image.Image:
    """The picture with a line of text above it."""
    size = max(12, round(picture.width / 60))
    font = ImageFont.load_default(size)
    out = Image.new('RGB', (picture.width, picture.height + 2 * size), '#1c1c1e')
    out.paste(picture, (0, 2 * size))
    draw = ImageDraw.Draw(out)
    x = float(size)
    for text, color in (
        (f'{counts["found"]} found', FOUND),
        (f'{counts["false"]} false', FALSE),
        (f'{counts["missed"]} missed', MISSED),
        (f'score {score_thresh:g} or more, IoU {iou_thresh:g} or more', '#c7c7cc'),
    ):
        draw.text((x, size / 2), text, fill=color, font=font)
        x += draw.textlength(text, font=font) + 2 * size
    return out
