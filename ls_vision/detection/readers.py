"""Reading annotations of any known format."""
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from ..runtime.errors import UserError
from .annotations import SHOWN, AnnotationError, Annotations
from .coco import read_coco
from .voc import read_voc


def read_annotations(
        path: str,
        image_dir: Optional[str] = None,
        class_names: Optional[Sequence[str]] = None,
        skip_bad: bool = False,
) -> Annotations:
    """Read and check COCO annotations (a .json file) or Pascal VOC annotations (an .xml file or a folder of them).

    Args:
        path: The annotations.
        image_dir: Folder of the images. By default that of the annotations, or its sibling in the VOC or COCO layout.
        class_names: Classes in the order of their labels, e.g. those of the training set; any other class is a problem.
            By default the file's categories by id (COCO) or all names in alphabetical order (VOC).
        skip_bad: Leave out bad records, and images that can't be read, instead of raising.

    Returns:
        The annotations, with the problems that were skipped.

    Raises:
        UserError: `path` does not exist, or no image is left.
        AnnotationError: There are problems and `skip_bad` is false; lists each by file and record.
    """
    if not Path(path).exists():
        raise UserError(f'annotations {path} do not exist; expected a COCO .json file or VOC .xml files')
    if image_dir is not None and not Path(image_dir).is_dir():
        raise UserError(f'image folder {image_dir} does not exist')
    reader = read_coco if Path(path).suffix == '.json' else read_voc
    annotations = reader(Path(path), Path(image_dir) if image_dir is not None else None, class_names)
    annotations.source = path
    if annotations.problems and not skip_bad:
        raise AnnotationError(path, annotations.problems)
    if not annotations.images or not annotations.class_names:
        details = '\n'.join(f'  {problem}' for problem in annotations.problems[:SHOWN])
        raise UserError(f'{path}: no image or no class is left to read' + (f':\n{details}' if details else ''))
    return annotations
