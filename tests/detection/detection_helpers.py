"""Small sets of annotated images, and detectors small enough for a test."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ls_vision.detection import build_detector

TINY = dict(embed_dims=[16, 16, 32, 32], num_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1], rank=3)


def tiny_detector(name: str = 'fcos', **kwargs: Any) -> nn.Module:
    """A detector of a hundred thousand parameters."""
    settings = dict(backbone='vil_ls_tiny_linear', backbone_kwargs=TINY, out_channels=32, num_classes=2)
    return build_detector(name, **{**settings, **kwargs})


def targets(boxes: list[list[float]], size: tuple[int, int], label: int = 1) -> dict[str, torch.Tensor]:
    """Targets of a detector, with masks that fill the boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top):int(bottom), int(left):int(right)] = 1
    return dict(boxes=torch.tensor(boxes), labels=torch.full((len(boxes),), label), masks=masks)


def write_coco(folder: Path, num_images: int = 2, size: tuple[int, int] = (96, 64), seed: int = 0) -> Path:
    """Images with bright squares on noise, and their annotations.json; returns its path."""
    rng = np.random.default_rng(seed)
    width, height = size
    content: dict[str, Any] = dict(images=[], annotations=[], categories=[
        dict(id=3, name='square'), dict(id=7, name='bar')])
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for j in range(3):
            w, h = (18, 18) if j % 2 == 0 else (28, 10)
            left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[top:top + h, left:left + w] = (250, 220, 80)
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=i + 10, category_id=3 if j % 2 == 0 else 7,
                bbox=[left, top, w, h], area=w * h, iscrowd=0,
                segmentation=[[left, top, left + w, top, left + w, top + h, left, top + h]]))
        Image.fromarray(pixels).save(folder / f'{i}.png')
        content['images'].append(dict(id=i + 10, file_name=f'{i}.png', width=width, height=height))
    path = folder / 'annotations.json'
    path.write_text(json.dumps(content))
    return path


def voc_xml(name: str, size: tuple[int, int], objects: list[tuple[str, tuple[float, ...]]]) -> str:
    """The text of a VOC file."""
    body = ''.join(
        f'<object><name>{label}</name><bndbox>' + ''.join(
            f'<{key}>{value}</{key}>' for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)) +
        '</bndbox></object>' for label, box in objects)
    return (f'<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height>'
            f'</size>{body}</annotation>')
