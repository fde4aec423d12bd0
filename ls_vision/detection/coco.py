"""COCO annotations: one JSON file with images, categories and annotations."""
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .annotations import Annotated, Annotations, Problem, check_image, find_image
from .segmentations import check_segmentation
from .values import BadValue, class_name, clip_box, flag, number, show, text, whole

Image = tuple[Path, int, int]  # path, width, height


class CocoReader:
    """Reads one file. Every bad record is left out and reported as a problem.

    Args:
        path: The file.
        image_dir: Folder of the images; None looks where COCO's own layout has them.
        with_masks: Objects without a segmentation are a problem, except crowds, for which their boxes stand.
    """

    def __init__(self, path: Path, image_dir: Optional[Path], with_masks: bool = False):
        self.path = path
        self.image_dir = image_dir
        self.with_masks = with_masks
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.image_ids: set[int] = set()  # of all image records, also of bad ones

    def read(self, class_names: Optional[Sequence[str]]) -> Annotations:
        content = self._load()
        categories = self._categories(content.get('categories', []), content.get('annotations', []))
        names = list(class_names) if class_names is not None else [categories[i] for i in sorted(categories)]
        labels = {}
        for category_id, name in categories.items():
            if name in names:
                labels[category_id] = names.index(name) + 1
            else:
                self._report(f'category {category_id}', f'class {name!r} is not one of {", ".join(names)}')
        images = self._images(content.get('images', []))
        objects = self._objects(content.get('annotations', []), images, labels)
        return Annotations(
            [_annotated(*images[image_id], image_id, objects[image_id]) for image_id in images], names, self.problems,
            notes=self.notes)

    def _load(self) -> dict[str, Any]:
        try:
            content = _parse(self.path.read_bytes())
        except json.JSONDecodeError as e:
            self._report(f'line {e.lineno}, column {e.colno}', f'not valid JSON: {e.msg}')
            return {}
        except UnicodeDecodeError as e:
            self._report('', f'is not UTF-8, UTF-16 or UTF-32, which JSON must be: {e}')
            return {}
        except RecursionError:
            self._report('', 'is nested too deeply for COCO annotations')
            return {}
        except OSError as e:
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

    def _categories(self, records: list[Any], annotations: list[Any]) -> dict[int, str]:
        """Names by id, without a root that only groups the others, as some exporters write one."""
        found: dict[int, str] = {}
        parents: dict[int, Any] = {}

        def add(record: dict[str, Any]) -> None:
            category_id, name = whole(record['id'], 'id'), class_name(record['name'])
            if category_id in found:
                raise BadValue(f'duplicate id {category_id}')
            if name in found.values():
                raise BadValue(f'duplicate name {name!r}')
            found[category_id], parents[category_id] = name, record.get('supercategory')

        self._each(records, 'categories', ('id', 'name'), 'needs a whole number `id` and a `name`', add)
        used = {_whole_or_none(record.get('category_id')) for record in annotations if isinstance(record, dict)}
        roots = [
            i for i, name in found.items() if i not in used and parents[i] in (None, '', 'none', 'None')
            and any(parents[other] == name for other in found if other != i)]
        self.notes += [
            f'{self.path}: category {i}, {found[i]!r}, only groups others and has no object: it is not a class'
            for i in roots]
        return {i: name for i, name in found.items() if i not in roots}

    def _images(self, records: list[Any]) -> dict[int, Image]:
        found: dict[int, Image] = {}
        ids = (_whole_or_none(record.get('id')) for record in records if isinstance(record, dict))
        self.image_ids = {image_id for image_id in ids if image_id is not None}
        folders = self._folders()

        def add(record: dict[str, Any]) -> None:
            image_id, width, height = (whole(record[key], key) for key in ('id', 'width', 'height'))
            if image_id in found:
                raise BadValue(f'duplicate id {image_id}')
            path = find_image(folders, text(record['file_name'], 'file_name'))
            check_image(path, width, height)
            found[image_id] = path, width, height

        self._each(
            records, 'images', ('id', 'width', 'height', 'file_name'),
            'needs whole numbers `id`, `width` and `height`, and a `file_name`', add)
        return found

    def _folders(self) -> list[Path]:
        if self.image_dir is not None:
            return [self.image_dir]
        # COCO's own layout is annotations/instances_val2017.json beside val2017/
        split = self.path.parent.parent / self.path.stem.rpartition('_')[2]
        return [self.path.parent, split] if split.is_dir() else [self.path.parent]

    def _objects(
            self,
            records: list[Any],
            images: dict[int, Image],
            labels: dict[int, int],
    ) -> dict[int, list[dict[str, Any]]]:
        """The objects of each image."""
        objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        seen: set[int] = set()

        def add(record: dict[str, Any]) -> None:
            object_id, image_id, category_id = (
                whole(record[key], key) for key in ('id', 'image_id', 'category_id'))
            if object_id in seen:
                raise BadValue(f'duplicate id {object_id}')
            seen.add(object_id)
            if image_id not in self.image_ids:
                raise BadValue(f'image_id {image_id} is not among the images')
            if category_id not in labels:
                raise BadValue(f'category_id {category_id} is not known')
            if image_id in images:  # otherwise the image itself has been reported
                objects[image_id].append(_parse_object(record, images[image_id], labels[category_id], self.with_masks))

        self._each(
            records, 'annotations', ('id', 'image_id', 'category_id', 'bbox'),
            'needs whole numbers `id`, `image_id` and `category_id`, and a `bbox`', add)
        return objects

    def _each(
            self,
            records: list[Any],
            kind: str,
            needed: Sequence[str],
            needs: str,
            add: Callable[[dict[str, Any]], None],
    ) -> None:
        """Add every record; report those that lack a value (what `needs` says) or hold a bad one."""
        for i, record in enumerate(records):
            where = f'{kind}[{i}]'
            if not isinstance(record, dict) or any(record.get(key) is None for key in needed):
                self._report(where, needs)
                continue
            try:
                add(record)
            except BadValue as e:
                self._report(where if kind == 'categories' else f'{where} (id {show(record["id"])})', str(e))

    def _report(self, record: str, message: str) -> None:
        self.problems.append(Problem(str(self.path), record, message))


def read_coco(
        path: Path,
        image_dir: Optional[Path],
        class_names: Optional[Sequence[str]],
        with_masks: bool = False,
) -> Annotations:
    """Read a file and check every record; bad ones are left out and listed in `problems`."""
    return CocoReader(path, image_dir, with_masks).read(class_names)


def _parse(content: bytes) -> Any:
    """JSON in any of its encodings, with or without a byte order mark."""
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # a whole number of thousands of digits
        return json.loads(content, parse_int=_parse_int)


def _parse_int(digits: str) -> float:
    """A whole number, or infinity for one too long to be read, so that its record is reported."""
    try:
        return int(digits)
    except ValueError:
        return math.inf


def _whole_or_none(value: Any) -> Optional[int]:
    try:
        return whole(value, 'id')
    except BadValue:
        return None


def _parse_object(record: dict[str, Any], image: Image, label: int, with_masks: bool) -> dict[str, Any]:
    _, width, height = image
    box = record['bbox']
    if not isinstance(box, list) or len(box) != 4:
        raise BadValue(f'bbox {show(box)} is not four numbers (left, top, width, height)')
    left, top, box_width, box_height = (number(value, 'bbox:') for value in box)
    corners = clip_box([left, top, left + box_width, top + box_height], width, height)
    crowd = flag(record.get('iscrowd'), 'iscrowd')
    area = number(record['area'], 'area') if record.get('area') is not None else 0.
    if area < 0:
        raise BadValue(f'area {area:g} is negative')
    segmentation = check_segmentation(record.get('segmentation'), width, height)
    if segmentation is None and crowd:
        segmentation = [corners[[0, 1, 2, 1, 2, 3, 0, 3]].tolist()]
    if segmentation is None and with_masks:
        raise BadValue('has no segmentation, which Mask R-CNN needs')
    return dict(box=corners, label=label, crowd=crowd, area=area or box_width * box_height, segmentation=segmentation)


def _annotated(path: Path, width: int, height: int, image_id: int, objects: list[dict[str, Any]]) -> Annotated:
    segmentations = [o['segmentation'] for o in objects]
    return Annotated(
        path, width, height, image_id,
        boxes=np.array([o['box'] for o in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([o['label'] for o in objects], dtype=np.int64),
        crowd=np.array([o['crowd'] for o in objects], dtype=bool),
        areas=np.array([o['area'] for o in objects], dtype=np.float64),
        segmentations=segmentations if all(s is not None for s in segmentations) else None)
