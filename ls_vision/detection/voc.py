"""Pascal VOC annotations: an XML file per image."""
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .annotations import Annotated, Annotations, Problem, check_box, check_image

CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


class VocReader:
    """Reads the files of a set. Every bad record is left out and reported as a problem."""

    def __init__(self, image_dir: Optional[Path]):
        self.image_dir = image_dir
        self.problems: list[Problem] = []

    def read_file(self, file: Path, names: Optional[Sequence[str]]) -> Optional[dict[str, Any]]:
        """Image and objects of one file, or None where they cannot be used."""
        try:
            root = ET.parse(file).getroot()
        except ET.ParseError as e:
            line, column = e.position
            self._report(file, f'line {line}, column {column}', f'not valid XML: {e}')
            return None
        except OSError as e:
            self._report(file, '', f'cannot be read: {e}')
            return None
        name = root.findtext('filename')
        size = [_number(root.findtext(f'size/{side}')) for side in ('width', 'height')]
        if not name or None in size:
            self._report(file, '', 'has no `filename`, or no `size` with `width` and `height`')
            return None
        width, height = (int(v) for v in size if v is not None)
        path = self._image_path(file, name)
        problem = check_image(path, width, height)
        if problem:
            self._report(file, '', problem)
            return None
        objects = []
        for i, node in enumerate(root.iter('object')):
            found = self._read_object(file, f'object {i + 1}', node, width, height, names)
            if found is not None:
                objects.append(found)
        return dict(path=path, width=width, height=height, objects=objects)

    def _read_object(
            self,
            file: Path,
            where: str,
            node: ET.Element,
            width: int,
            height: int,
            names: Optional[Sequence[str]],
    ) -> Optional[tuple[str, np.ndarray, bool]]:
        name = (node.findtext('name') or '').strip()
        corners = [_number(node.findtext(f'bndbox/{corner}')) for corner in CORNERS]
        if not name:
            self._report(file, where, 'has no `name`')
        elif names is not None and name not in names:
            self._report(file, where, f'class {name!r} is not one of {", ".join(names)}')
        elif None in corners:
            self._report(file, where, f'`bndbox` needs the numbers {", ".join(CORNERS)}')
        else:
            # VOC counts pixels from 1 and includes the last one: a box over a whole line is 1 to width.
            box = np.array(corners, dtype=np.float64) - [1, 1, 0, 0]
            problem = check_box(box, width, height)
            if problem is None:
                return name, box.clip(0, [width, height, width, height]), node.findtext('difficult') == '1'
            self._report(file, where, problem)
        return None

    def _image_path(self, file: Path, name: str) -> Path:
        if self.image_dir is not None:
            return self.image_dir / name
        # VOC's own layout is Annotations/ beside JPEGImages/
        beside = file.parent / name
        sibling = file.parent.parent / 'JPEGImages' / name
        return sibling if not beside.exists() and sibling.exists() else beside

    def _report(self, file: Path, record: str, message: str) -> None:
        self.problems.append(Problem(str(file), record, message))


def read_voc(path: Path, image_dir: Optional[Path], class_names: Optional[Sequence[str]]) -> Annotations:
    """Read a file or all files of a folder; bad records are left out and listed in `problems`.

    Objects marked as difficult count as crowds: left out of training, and ignored in evaluation.
    """
    files = sorted(path.glob('*.xml')) if path.is_dir() else [path]
    reader = VocReader(image_dir)
    found = [content for file in files if (content := reader.read_file(file, class_names)) is not None]
    seen: dict[Path, int] = {}
    for content in list(found):
        if content['path'] in seen:
            reader.problems.append(Problem(str(path), str(content['path']), 'duplicate: two files annotate this image'))
            found.remove(content)
        seen[content['path']] = 1
    names = list(class_names) if class_names is not None else sorted({o[0] for c in found for o in c['objects']})
    images = [
        _annotated(content, i + 1, {name: label + 1 for label, name in enumerate(names)})
        for i, content in enumerate(found)]
    return Annotations(images, names, reader.problems)


def _annotated(content: dict[str, Any], image_id: int, labels: dict[str, int]) -> Annotated:
    objects = content['objects']
    boxes = np.array([box for _, box, _ in objects], dtype=np.float64).reshape(-1, 4)
    return Annotated(
        content['path'], content['width'], content['height'], image_id, boxes,
        labels=np.array([labels[name] for name, _, _ in objects], dtype=np.int64),
        crowd=np.array([difficult for _, _, difficult in objects], dtype=bool),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _number(text: Optional[str]) -> Optional[float]:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
