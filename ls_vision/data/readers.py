"""Readers of image folders and tar archives: the class of an image is its folder at the first level.

timm's readers take the innermost folder's name, so that `cat/indoor` and `dog/indoor` become one class, and leave out
hidden rules, empty classes and images of other types without a word.
"""
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, TarState, extract_tarinfos

from ..runtime.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.jfif', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.avif', '.ppm', '.pgm', '.jp2')
OTHER_SUFFIXES = ('.heic', '.heif', '.jxl', '.svg', '.dng', '.cr2', '.nef', '.arw', '.raw', '.npy')  # not of Pillow
IMAGE_MODES = {1: 'L', 3: 'RGB'}  # by the channels of a model
OF_SYSTEMS = ('__MACOSX', '@eaDir', 'lost+found')  # folders of macOS' zip files, Synology and Linux


class FolderReader(Reader):
    """The images of a folder with a sub-folder per class, and in these any number of further folders.

    Hidden folders and files are left out.

    Args:
        root: The folder.
        suffixes: Lower-case suffixes of image files.

    Attributes:
        class_to_idx: Number of each class by name, in natural order until `number` is called.
        notes: What the user should know about the folder.

    Raises:
        UserError: There are no images, images of no class, two classes of one name, or a class without a readable type.
    """

    def __init__(self, root: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES):
        super().__init__()
        self.root = Path(root)
        self.samples: list[tuple[str, str]] = []  # path and class
        self.notes: list[str] = []
        loose = [file.name for file in _visible(self.root) if is_image(file.name, suffixes) and file.is_file()]
        if loose:
            raise UserError(
                f'{root} holds {len(loose)} images of no class, e.g. {printable(loose[0])}: every image must be in the '
                'folder of its class')
        folders = [folder for folder in _visible(self.root) if folder.is_dir()]
        check_names((folder.name for folder in folders), str(root))
        for folder in folders:
            self._add(folder, suffixes)
        if not self.samples:
            raise UserError(f'Found 0 images in subfolders of {root}; suffixes of images: {", ".join(suffixes)}')
        self.samples.sort(key=lambda sample: natural_order(sample[0]))
        self.class_to_idx = number_classes(name for _, name in self.samples)
        self._note_folders()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, name = self.samples[index]
        return open(path, 'rb'), self.class_to_idx[name]

    def number(self, class_to_idx: Mapping[str, int]) -> None:
        """Give the classes these numbers."""
        self.class_to_idx = dict(class_to_idx)

    def _add(self, folder: Path, suffixes: Sequence[str]) -> None:
        name, others = class_name(folder.name), Counter[str]()
        before = len(self.samples)
        for path in _walk(folder):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in suffixes:
                self.samples.append((path, name))
            elif suffix in OTHER_SUFFIXES or suffix in Image.registered_extensions():
                others[suffix] += 1
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in sorted(others.items()))
        if others and len(self.samples) == before:
            raise UserError(
                f'class folder {printable(str(folder))} holds only images of types that are not read ({kinds}): '
                f'convert them to one of {", ".join(suffixes)}, or remove the folder')
        if others:
            self.notes.append(f'{printable(str(folder))}: left out {kinds}, types that are not read')
        elif len(self.samples) == before:
            self.notes.append(f'{printable(str(folder))} holds no image and is no class')

    def _note_folders(self) -> None:
        nested = {name for path, name in self.samples if len(Path(path).relative_to(self.root).parts) > 2}
        if nested and len(self.class_to_idx) == 1:
            raise UserError(
                f'{self.root} holds one class, {nested.pop()!r}, with folders in it; if these are the classes, pass '
                'the folder one level further in')
        if nested:
            self.notes.append(
                f'{self.root}: folders within {len(nested)} classes, e.g. {min(nested)!r}, are parts of their class')

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class TarReader(ReaderImageInTar):
    """The images of a tar archive, by the same rules; folders that hold everything, as `./` or `train/`, don't count.

    Raises:
        UserError: It cannot be read, or there are no images, images of no class, or two classes of one name.
    """

    def __init__(self, root: str | os.PathLike[str]):
        Reader.__init__(self)
        self.root = str(root)
        self.notes: list[str] = []
        if not self.root.endswith('.tar'):
            raise UserError(f'{root}: expected a folder or a .tar archive')
        try:
            found, _, _, tarfiles = extract_tarinfos(self.root, extensions=set(SUFFIXES))
        except ValueError as e:  # timm unpacks an empty list
            raise UserError(f'{root}: found 0 images; suffixes of images: {", ".join(SUFFIXES)}') from e
        except (tarfile.TarError, OSError) as e:
            raise UserError(f'{root} cannot be read as a tar archive: {e}') from e
        folders = [_folders_in_tar(*sample) for sample in found]
        kept = [i for i, parts in enumerate(folders) if not any(_is_hidden(part) for part in parts)
                and not _is_hidden(os.path.basename(found[i][0].path))]
        self.samples = found[kept]
        folders = [folders[i] for i in kept]
        while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
            folders = [parts[1:] for parts in folders]
        if not folders or not all(folders):
            raise UserError(f'{root}: every image must be in the folder of its class')
        names = [parts[0] for parts in folders]
        check_names(dict.fromkeys(names), self.root)
        self.names = [class_name(name) for name in names]
        self.number(number_classes(self.names))
        self.root_is_tar = True
        self.tar_state: TarState = tarfiles[0][1]
        self.cache_tarfiles = True

    def number(self, class_to_idx: Mapping[str, int]) -> None:
        """Give the classes these numbers."""
        self.class_to_idx = dict(class_to_idx)
        self.targets = [class_to_idx[name] for name in self.names]


def open_images(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> ImageDataset:
    """A folder or tar archive of images as a dataset of timm."""
    reader = TarReader(path) if os.path.isfile(path) else FolderReader(path, suffixes)
    return ImageDataset(str(path), reader=reader)


def image_mode(model_kwargs: Mapping[str, Any]) -> str:
    """Pillow's name of the colour mode that a model with these constructor arguments takes.

    Raises:
        UserError: There is none.
    """
    channels = model_kwargs.get('in_chans', 3)
    if channels not in IMAGE_MODES:
        raise UserError(
            f'--model-kwargs in_chans={channels}: images are read with 3 channels (RGB) or with 1 (grey); a model of '
            'more takes tensors of your own, in Python')
    return IMAGE_MODES[channels]


def class_name(folder: str) -> str:
    """The class of a folder's name: text that can be printed, in one form of Unicode (macOS decomposes accents)."""
    return unicodedata.normalize('NFC', printable(folder))


def printable(path: str) -> str:
    """A file name as text; bytes that are not UTF-8 are read as Latin-1."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode('latin-1')
    return path


def check_names(folders: Iterable[str], root: str) -> None:
    """Refuse folders whose names are the same class, e.g. in two forms of Unicode."""
    count = Counter(class_name(folder) for folder in folders)
    doubled = [name for name, number in count.items() if number > 1]
    if doubled:
        raise UserError(f'{root}: {count[doubled[0]]} folders are called {doubled[0]!r}, in other bytes; merge them')


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """The number of each class in natural order."""
    return {name: i for i, name in enumerate(sorted(set(names), key=natural_order))}


def natural_order(name: str) -> tuple[list[Any], str]:
    """timm's order, in which 10 follows 9 and case does not count, with a rule for names that differ in case only."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())], name


def _walk(folder: Path) -> Iterator[str]:
    """All files below a folder, hidden ones left out; of folders that links lead to again, once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else [name for name in folders if not _is_hidden(name)]
        if here not in seen:
            yield from (os.path.join(root, name) for name in files if not _is_hidden(name))
        seen.add(here)


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not _is_hidden(path.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in OF_SYSTEMS


def is_image(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Whether a file is called like an image."""
    return os.path.splitext(name)[1].lower() in suffixes


def _folders_in_tar(image: tarfile.TarInfo, archive: str | None, inner: tarfile.TarInfo | None) -> list[str]:
    """The folders above an image; an archive within the archive counts as one."""
    path = os.path.dirname(image.path) if inner is None else (
        os.path.join(os.path.splitext(inner.path)[0], os.path.dirname(image.path)))
    return [part for part in path.split('/') if part not in ('', '.')]
