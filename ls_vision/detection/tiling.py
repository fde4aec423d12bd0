"""Detection in images of any size: whole, or in overlapping tiles whose boxes are merged."""
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from .evaluation import Detections

Tile = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def detect(
        model: nn.Module,
        image: Tensor,
        tile_size: Optional[int] = None,
        overlap: int = 128,
        nms_thresh: float = .5,
        max_dets: int = 100,
        batch_size: int = 1,
) -> Detections:
    """Detect objects in a whole image or tile by tile.

    The core of a tile is the tile without half of its overlaps. A box counts only in the tile whose core contains its
    centre. A final non-maximum suppression merges duplicates near the border of two cores. An object no larger than
    the overlap lies completely within the tile in which it counts.

    Args:
        model: A torchvision detector in evaluation.
        image: (3, H, W) from 0 to 1, on the model's device.
        tile_size: Side of the tiles in pixels. With None, or if the image is no larger, the whole image is one tile.
        overlap: Smallest overlap of neighbouring tiles in pixels.
        nms_thresh: IoU above which the weaker of two boxes of a class is dropped.
        max_dets: Largest number of boxes to return.
        batch_size: Tiles per forward pass.

    Returns:
        `boxes` (N, 4), `scores` (N,) and `labels` (N,), the best first; for a whole image also `masks`.

    Raises:
        ValueError: The overlap is not smaller than a tile, or negative.
    """
    _, height, width = image.shape
    with torch.inference_mode():
        if tile_size is None or max(height, width) <= tile_size:
            found = model([image])[0]
            return {name: value[:max_dets] for name, value in found.items()}
        tiles = list(make_tiles(height, width, tile_size, overlap))
        parts = []
        for i in range(0, len(tiles), batch_size):
            batch = tiles[i:i + batch_size]
            results = model([image[:, top:bottom, left:right] for left, top, right, bottom in batch])
            parts += [_in_core(found, tile, (height, width), tiles) for tile, found in zip(batch, results, strict=True)]
    merged = {name: torch.cat([part[name] for part in parts]) for name in ('boxes', 'scores', 'labels')}
    keep = batched_nms(merged['boxes'], merged['scores'], merged['labels'], nms_thresh)[:max_dets]
    return {name: value[keep] for name, value in merged.items()}


def make_tiles(height: int, width: int, tile_size: int, overlap: int) -> Iterator[Tile]:
    """Tiles that cover an image, row by row; the last ones end at its right and lower edges."""
    if not 0 <= overlap < tile_size:
        raise ValueError(f'overlap {overlap}: must be 0 or more and below the tile size {tile_size}')
    for top in _starts(height, tile_size, overlap):
        for left in _starts(width, tile_size, overlap):
            yield left, top, min(left + tile_size, width), min(top + tile_size, height)


def _starts(length: int, tile_size: int, overlap: int) -> list[int]:
    """Multiples of 32, as far as the last tile allows, so that a tile's feature maps lie on the image's."""
    if length <= tile_size:
        return [0]
    step = max((tile_size - overlap) // 32 * 32, 1) if tile_size - overlap >= 32 else tile_size - overlap
    starts = list(range(0, length - tile_size, step))
    return [*starts, length - tile_size]


def _in_core(found: Detections, tile: Tile, size: tuple[int, int], tiles: list[Tile]) -> Detections:
    """The boxes whose centre lies in the tile's core, in pixels of the image."""
    height, width = size
    x_bounds = _core(tile[0], tile[2], width, {(t[0], t[2]) for t in tiles})
    y_bounds = _core(tile[1], tile[3], height, {(t[1], t[3]) for t in tiles})
    boxes = found['boxes'] + found['boxes'].new_tensor([tile[0], tile[1], tile[0], tile[1]])
    x, y = (boxes[:, :2] + boxes[:, 2:]).div(2).unbind(1)
    inside = (x >= x_bounds[0]) & (x < x_bounds[1]) & (y >= y_bounds[0]) & (y < y_bounds[1])
    return dict(boxes=boxes[inside], scores=found['scores'][inside], labels=found['labels'][inside])


def _core(start: int, end: int, length: int, spans: set[tuple[int, int]]) -> tuple[float, float]:
    """A tile's share of one axis: up to the middle of its overlaps with its neighbours."""
    before = [span for span in spans if span[0] < start]
    after = [span for span in spans if span[0] > start]
    low = (max(before)[1] + start) / 2 if before else 0.
    high = (end + min(after)[0]) / 2 if after else length + 1.
    return low, high
