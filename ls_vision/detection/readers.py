"""Reading annotations of any known format."""
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

from ..runtime.errors import UserError
from .annotations import SHOWN, AnnotationError, Annotations
from .coco import read_coco
from .values import class_name
from .voc import read_voc


def read_annotations(
        path: str,
        image_dir: Optional[str] = None,
        class_names: Optional[Sequence[str]] = None,
        skip_bad: bool = False,
        with_masks: bool = False,
) -> Annotations:
    """Read and check COCO annotations (a .json file) or Pascal VOC annotations (an .xml file or a folder of them).

    Image files are checked by their headers, not decoded.

    Args:
        path: The annotations.
        image_dir: Folder of the images. By default that of the annotations, or its sibling in the VOC or COCO layout.
        class_names: Classes in the order of their labels, e.g. those of the training set; any other class is a problem.
            By default the file's categories by id (COCO) or all names in alphabetical order (VOC).
        skip_bad: Leave out bad records, and images that can't be read, instead of raising.
        with_masks: Every object but a crowd needs a segmentation, as for Mask R-CNN; only COCO has them.

    Returns:
        The annotations, with the problems that were skipped.

    Raises:
        UserError: `path` does not exist or is of another kind, or no image is left.
        AnnotationError: There are problems and `skip_bad` is false; lists each by file and record.
    """
    if not Path(path).exists():
        raise UserError(f'annotations {path} do not exist; expected a COCO .json file or VOC .xml files')
    if image_dir is not None and not Path(image_dir).is_dir():
        raise UserError(f'image folder {image_dir} does not exist')
    names = None if class_names is None else [class_name(name) for name in class_names]
    read = _find_reader(Path(path), with_masks)
    annotations = read(Path(path), Path(image_dir) if image_dir is not None else None, names)
    annotations.source = path
    if annotations.problems and not skip_bad:
        raise AnnotationError(path, annotations.problems)
    if not annotations.images or not annotations.class_names:
        details = '\n'.join(f'  {problem}' for problem in annotations.problems[:SHOWN])
        raise UserError(f'{path}: no image or no class is left to read' + (f':\n{details}' if details else ''))
    return annotations


def _find_reader(path: Path, with_masks: bool) -> Any:
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in ('.json', '.xml'):
        raise UserError(f'annotations {path}: expected a COCO .json file, or a VOC .xml file or a folder of them')
    if suffix == '.json' and not path.is_dir():
        return partial(read_coco, with_masks=with_masks)
    if with_masks:
        raise UserError(f'annotations {path}: Pascal VOC has no masks, which Mask R-CNN needs; COCO .json files have')
    if path.is_dir() and not any(file.suffix.lower() == '.xml' for file in path.iterdir()):
        found = ', '.join(sorted(file.name for file in path.glob('*.[jJ][sS][oO][nN]'))) or 'none of these'
        raise UserError(f'annotations {path}: the folder holds no VOC .xml files; its COCO files: {found}')
    return read_voc
