"""Pascal VOC annotations: an XML file per image."""
import codecs
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .annotations import Annotated, Annotations, Problem, check_image, find_image
from .values import BadValue, class_name, clip_box, flag, number, text, whole

CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
DECLARED = re.compile(rb'<\?xml[^>]*?encoding\s*=\s*["\']([A-Za-z0-9._:-]+)["\']')
SUPERSETS = {'gb2312': 'gb18030', 'gbk': 'gb18030', 'shift_jis': 'cp932'}  # what tools write that declare the former
STARTS = {  # first bytes that tell the encoding
    codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16',
    b'<\0': 'utf-16-le', b'\0<': 'utf-16-be',
}


class VocReader:
    """Reads the files of a set. Every bad record is left out and reported as a problem."""

    def __init__(self, image_dir: Optional[Path]):
        self.image_dir = image_dir
        self.problems: list[Problem] = []

    def read_file(self, file: Path, names: Optional[Sequence[str]]) -> Optional[dict[str, Any]]:
        """Image and objects of one file, or None where they cannot be used."""
        try:
            root = ET.fromstring(decode_xml(file.read_bytes()))
        except ET.ParseError as e:
            line, column = e.position
            self._report(file, f'line {line}, column {column}', f'not valid XML: {e}')
            return None
        except OSError as e:
            self._report(file, '', f'cannot be read: {e}')
            return None
        except BadValue as e:
            self._report(file, '', str(e))
            return None
        name, *size = (root.findtext(key) for key in ('filename', 'size/width', 'size/height'))
        if not name or None in size:
            self._report(file, '', 'has no `filename`, or no `size` with `width` and `height`')
            return None
        try:
            width, height = (whole(v, side) for v, side in zip(size, ('width', 'height'), strict=True))
            path = find_image(self._folders(file), text(name, '`filename`'))
            check_image(path, width, height)
        except BadValue as e:
            self._report(file, '', str(e))
            return None
        objects = []
        for i, node in enumerate(root.iter('object')):
            try:
                objects.append(_read_object(node, width, height, names))
            except BadValue as e:
                self._report(file, f'object {i + 1}', str(e))
        return dict(path=path, width=width, height=height, objects=objects)

    def _folders(self, file: Path) -> list[Path]:
        # VOC's own layout is Annotations/ beside JPEGImages/
        return [self.image_dir] if self.image_dir is not None else [file.parent, file.parent.parent / 'JPEGImages']

    def _report(self, file: Path, record: str, message: str) -> None:
        self.problems.append(Problem(str(file), record, message))


def read_voc(path: Path, image_dir: Optional[Path], class_names: Optional[Sequence[str]]) -> Annotations:
    """Read a file or all files of a folder; bad records are left out and listed in `problems`.

    Objects marked as difficult count as crowds: left out of training, and ignored in evaluation.
    """
    # macOS writes a hidden file, ._NAME, beside each file on foreign disks
    files = sorted(
        file for file in path.iterdir() if file.suffix.lower() == '.xml' and not file.name.startswith('.')
    ) if path.is_dir() else [path]
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


def decode_xml(content: bytes) -> str:
    """The text of an XML file, by its byte order mark or the encoding that it declares, else as UTF-8.

    Raises:
        BadValue: The encoding is not known, or the bytes are not of it.
    """
    declared = DECLARED.search(content[:400])
    name = declared[1].decode().lower() if declared else 'utf-8'
    start = next((encoding for mark, encoding in STARTS.items() if content.startswith(mark)), None)
    if start is not None:
        name = start
    elif name.startswith(('utf-16', 'utf16', 'ucs-2', 'utf-32')):
        name = 'utf-8'  # bytes in which the declaration can be read are not of these
    try:
        return content.decode(SUPERSETS.get(name, name))
    except LookupError as e:
        raise BadValue(f'declares the encoding {name!r}, which is not known') from e
    except ValueError as e:
        raise BadValue(f'its text is not of the encoding {name!r}: {e}') from e


def _read_object(
        node: ET.Element,
        width: int,
        height: int,
        names: Optional[Sequence[str]],
) -> tuple[str, np.ndarray, bool]:
    """Class, box and whether it is difficult."""
    label = node.findtext('name')
    if not (label or '').strip():
        raise BadValue('has no `name`')
    name = class_name(label)
    if names is not None and name not in names:
        raise BadValue(f'class {name!r} is not one of {", ".join(names)}')
    try:
        left, top, right, bottom = (number(node.findtext(f'bndbox/{corner}'), corner) for corner in CORNERS)
    except BadValue as e:
        raise BadValue(f'`bndbox` needs the numbers {", ".join(CORNERS)}: {e}') from e
    # VOC counts pixels from 1 and includes the last one: a box over a whole line is 1 to width.
    box = clip_box([left - 1, top - 1, right, bottom], width, height)
    return name, box, flag(node.findtext('difficult'), '`difficult`')


def _annotated(content: dict[str, Any], image_id: int, labels: dict[str, int]) -> Annotated:
    objects = content['objects']
    boxes = np.array([box for _, box, _ in objects], dtype=np.float64).reshape(-1, 4)
    return Annotated(
        content['path'], content['width'], content['height'], image_id, boxes,
        labels=np.array([labels[name] for name, _, _ in objects], dtype=np.int64),
        crowd=np.array([difficult for _, _, difficult in objects], dtype=bool),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
