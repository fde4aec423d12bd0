"""COCO annotations: one JSON file with images, categories and annotations."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .annotations import Annotated, Annotations, Problem, check_box, check_image


class CocoReader:
    """Reads one file. Every bad record is left out and reported as a problem."""

    def __init__(self, path: Path, image_dir: Optional[Path]):
        self.path = path
        self.image_dir = image_dir
        self.problems: list[Problem] = []
        self.image_ids: set[int] = set()  # of all image records, also of bad ones

    def read(self, class_names: Optional[Sequence[str]]) -> Annotations:
        content = self._load()
        categories = self._categories(content.get('categories', []))
        names = list(class_names) if class_names is not None else [categories[i] for i in sorted(categories)]
        labels = {}
        for category_id, name in categories.items():
            if name in names:
                labels[category_id] = names.index(name) + 1
            else:
                self._report(f'category {category_id}', f'class {name!r} is not one of {", ".join(names)}')
        images = self._images(content.get('images', []))
        objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        self._objects(content.get('annotations', []), images, labels, objects)
        return Annotations(
            [_annotated(*images[image_id], image_id, objects[image_id]) for image_id in images], names, self.problems)

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding='utf-8'))
        except json.JSONDecodeError as e:
            self._report(f'line {e.lineno}, column {e.colno}', f'not valid JSON: {e.msg}')
            return {}
        except (OSError, UnicodeDecodeError) as e:
            self._report('', f'cannot be read: {e}')
            return {}
        if not isinstance(content, dict):
            self._report('', f'holds a {type(content).__name__}, expected images, categories and annotations')
            return {}
        for key in ('images', 'categories', 'annotations'):
            if not isinstance(content.get(key), list):
                self._report('', f'has no list {key!r}')
                content[key] = []
        return content

    def _categories(self, records: list[Any]) -> dict[int, str]:
        found: dict[int, str] = {}
        for i, record in enumerate(records):
            where = f'categories[{i}]'
            if not _has(record, id=int, name=str):
                self._report(where, 'needs a whole number `id` and a `name`')
            elif record['id'] in found:
                self._report(where, f'duplicate id {record["id"]}')
            elif record['name'] in found.values():
                self._report(where, f'duplicate name {record["name"]!r}')
            else:
                found[record['id']] = record['name']
        return found

    def _images(self, records: list[Any]) -> dict[int, tuple[Path, int, int]]:
        found: dict[int, tuple[Path, int, int]] = {}
        for i, record in enumerate(records):
            where = f'images[{i}]'
            if _has(record, id=int):
                self.image_ids.add(record['id'])
            if not _has(record, id=int, file_name=str, width=int, height=int):
                self._report(where, 'needs whole numbers `id`, `width` and `height`, and a `file_name`')
                continue
            where += f' (id {record["id"]})'
            path = self._image_path(record['file_name'])
            problem = check_image(path, record['width'], record['height'])
            if record['id'] in found:
                self._report(where, f'duplicate id {record["id"]}')
            elif problem:
                self._report(where, problem)
            else:
                found[record['id']] = (path, record['width'], record['height'])
        return found

    def _image_path(self, file_name: str) -> Path:
        if self.image_dir is not None:
            return self.image_dir / file_name
        # COCO's own layout is annotations/instances_val2017.json beside val2017/
        split = self.path.parent.parent / self.path.stem.rpartition('_')[2]
        beside = self.path.parent / file_name
        return split / file_name if not beside.exists() and split.is_dir() else beside

    def _objects(
            self,
            records: list[Any],
            images: dict[int, tuple[Path, int, int]],
            labels: dict[int, int],
            objects: dict[int, list[dict[str, Any]]],
    ) -> None:
        seen: set[int] = set()
        for i, record in enumerate(records):
            where = f'annotations[{i}]'
            if not _has(record, id=int, image_id=int, category_id=int, bbox=list):
                self._report(where, 'needs whole numbers `id`, `image_id` and `category_id`, and a `bbox`')
                continue
            where += f' (id {record["id"]})'
            if record['id'] in seen:
                self._report(where, f'duplicate id {record["id"]}')
                continue
            seen.add(record['id'])
            if record['image_id'] not in self.image_ids:
                self._report(where, f'image_id {record["image_id"]} is not among the images')
            elif record['category_id'] not in labels:
                self._report(where, f'category_id {record["category_id"]} is not known')
            elif record['image_id'] in images:  # otherwise the image itself has been reported
                problem = self._add(record, images[record['image_id']], labels, objects[record['image_id']])
                if problem:
                    self._report(where, problem)

    def _add(
            self,
            record: dict[str, Any],
            image: tuple[Path, int, int],
            labels: dict[int, int],
            objects: list[dict[str, Any]],
    ) -> Optional[str]:
        box = record['bbox']
        if len(box) != 4 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box):
            return f'bbox {box} is not four numbers (left, top, width, height)'
        _, width, height = image
        corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], dtype=np.float64)
        problem = check_box(corners, width, height) or _check_segmentation(record.get('segmentation'))
        if problem:
            return problem
        objects.append(dict(
            box=corners.clip(0, [width, height, width, height]),
            label=labels[record['category_id']],
            crowd=bool(record.get('iscrowd', 0)),
            area=float(record.get('area') or box[2] * box[3]),
            segmentation=record.get('segmentation') or None,
        ))
        return None

    def _report(self, record: str, message: str) -> None:
        self.problems.append(Problem(str(self.path), record, message))


def read_coco(path: Path, image_dir: Optional[Path], class_names: Optional[Sequence[str]]) -> Annotations:
    """Read a file and check every record; bad ones are left out and listed in `problems`."""
    return CocoReader(path, image_dir).read(class_names)


def _annotated(path: Path, width: int, height: int, image_id: int, objects: list[dict[str, Any]]) -> Annotated:
    segmentations = [o['segmentation'] for o in objects]
    return Annotated(
        path, width, height, image_id,
        boxes=np.array([o['box'] for o in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([o['label'] for o in objects], dtype=np.int64),
        crowd=np.array([o['crowd'] for o in objects], dtype=bool),
        areas=np.array([o['area'] for o in objects], dtype=np.float64),
        segmentations=segmentations if all(s is not None for s in segmentations) else None)


def _check_segmentation(value: Any) -> Optional[str]:
    if not value:
        return None
    if isinstance(value, dict):
        return None if {'counts', 'size'} <= value.keys() else 'segmentation has no `counts` and `size`'
    polygons = isinstance(value, list) and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value)
    return None if polygons else 'segmentation is not a list of polygons of three points or more'


def _has(record: Any, **types: type) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(key), kind) and not isinstance(record[key], bool) for key, kind in types.items())
