"""The one reader of pictures, and datasets that count every file that cannot be decoded.

timm's dataset silently replaces an unreadable image and its label by the next one, in evaluation too.
"""
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.errors import first_line
from .folders import class_names

UNREADABLE = -1  # the target of an image that could not be read

MAX_PIXELS = 'LS_VISION_MAX_PIXELS'  # environment variable: pixels of the largest image to read
ORIENTATION = 0x0112  # tag of EXIF and TIFF; 1 is upright, from 5 on rows and columns are exchanged
PNG_ORIENTATIONS = ('exif', 'xmp', 'XML:com.adobe.xmp', 'Raw profile type exif')  # where Pillow finds one
BITS, SAMPLES, EXTRA_SAMPLES = 258, 277, 338  # tags of TIFF: bits of a band, bands, what those beyond colours are
COMPRESSION, PLANAR, FILL_ORDER, STRIP_OFFSETS, STRIP_LENGTHS = 259, 284, 266, 273, 279  # of TIFF
COLORS = {'1': 1, 'L': 1, 'P': 1, 'F': 1, 'CMYK': 4}  # bands by Pillow's mode; 3 for any other
TWELVE_BITS = 4095

_unlimited = threading.Lock()


class ImageError(OSError):
    """An image file that is damaged or of a kind that is not read; the message says why."""


def read_image(file: Any, mode: str = 'RGB', size: Optional[tuple[int, int]] = None) -> Image.Image:
    """Decode an image, the first frame or page of several, to 8 bits per channel.

    * Whole numbers of more than 8 bits are divided by 257, as 16-bit values; other values than 0 to 65,535 are refused.
      12 bits stored in 16 are read as 16 and thus dark: multiply them by 16 before.
    * Floats from 0 to 1 are multiplied by 255; an image with others is refused.
    * Transparency is dropped; more bands than colours and transparency are refused.
    * EXIF's orientation is applied where `size` is that of the turned image, and not without `size`, as in timm and
      torchvision. TIFF files are always turned, by Pillow.
    * Images of more pixels than Pillow's limit are read where `size` is theirs, or LS_VISION_MAX_PIXELS allows them.

    Args:
        file: Path or file.
        mode: Pillow's name of the colour mode; empty keeps the file's.
        size: Width and height that the image must have, e.g. of its annotation.

    Raises:
        ImageError: The image cannot be read, or not by these rules, or is not of that size.
    """
    with _open(file, size) as image:
        image.load()
        if size is not None:
            _check_size(image, size)  # again: PNG may have its orientation after the pixels
            image = image if image.size == size else ImageOps.exif_transpose(image)
        if image.mode == 'F' or image.mode.startswith('I'):
            image = _to_eight_bits(image)
        return image.convert(mode) if mode else image.copy()


def map_pixels(path: Path, size: Optional[tuple[int, int]] = None) -> Optional[np.ndarray]:
    """(H, W, 3) uint8 of an uncompressed TIFF file, of which only the parts that are used are read from the disk.

    Args:
        path: The file.
        size: As for `read_image`.

    Returns:
        The pixels, or None where the file is compressed, in tiles, or not 8-bit RGB; `read_image` decodes all of it.

    Raises:
        ImageError: As `read_image`; also where the file is too short.
    """
    with _open(path, size) as image:
        tags = getattr(image, 'tag_v2', {})
        usual = {COMPRESSION: 1, PLANAR: 1, FILL_ORDER: 1, ORIENTATION: 1}
        starts, lengths = (np.array(tags.get(tag, ()), dtype=np.int64) for tag in (STRIP_OFFSETS, STRIP_LENGTHS))
        if image.mode != 'RGB' or tags.get(BITS) != (8, 8, 8) or len(starts) == 0 or len(starts) != len(lengths) or any(
                tags.get(tag, value) != value for tag, value in usual.items()):
            return None
        if (starts[1:] != starts[:-1] + lengths[:-1]).any() or lengths.sum() != image.width * image.height * 3:
            return None
        # copy on write: torch wants memory that it may write
        return np.memmap(path, np.uint8, 'c', int(starts[0]), (image.height, image.width, 3))


def check_header(file: Any, size: tuple[int, int]) -> None:
    """Check what an image's header tells: whether it is of a kind that is read, and of a width and height.

    Raises:
        ImageError: It is not.
    """
    with _open(file, size):
        pass


@contextmanager
def _open(file: Any, size: Optional[tuple[int, int]]) -> Iterator[Image.Image]:
    """An image whose header is accepted. Pillow raises errors of many kinds, here and while it decodes."""
    allowed = _allowed_pixels()
    if allowed:
        Image.MAX_IMAGE_PIXELS = allowed  # for good: crops of the image are checked by Pillow too
    trusted = size is not None and size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0)
    try:
        with _without_limit() if trusted else nullcontext(), Image.open(file) as image:
            if allowed and not trusted and image.width * image.height > allowed:
                raise ImageError(f'has {image.width * image.height} pixels, more than {MAX_PIXELS}={allowed}')
            _check_bands(image)
            if size is not None:
                _check_size(image, size)
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise ImageError(
            f'cannot be read as an image: {e} Set the environment variable {MAX_PIXELS} to the pixels of the largest '
            'image that you trust') from e
    except Exception as e:
        raise ImageError(f'cannot be read as an image: {_tiff_kind(file) or first_line(e)}') from e


def _allowed_pixels() -> int:
    text = os.environ.get(MAX_PIXELS, '0')
    if not text.isdecimal():
        raise ImageError(f'cannot be read as an image: {MAX_PIXELS}={text!r} is not a number of pixels')
    return int(text)


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lift Pillow's limit of pixels, which is global, for one image at a time."""
    with _unlimited:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_bands(image: Image.Image) -> None:
    """Refuse bands that Pillow would drop without a word; only TIFF has any number of them."""
    tags = getattr(image, 'tag_v2', {})
    samples, extra = tags.get(SAMPLES, 1), tags.get(EXTRA_SAMPLES, ())
    transparent = len(extra) == 1 and extra[0] in (1, 2)
    if samples > COLORS.get(image.mode.split(';')[0], 1 if image.mode.startswith('I') else 3) + transparent:
        raise ImageError(f'has {samples} bands; one (grey) or three (RGB) are read, besides transparency')


def _tiff_kind(file: Any) -> str:
    """What is special about a TIFF file that Pillow cannot open; empty where it is not such a file."""
    try:
        with open(file, 'rb') if isinstance(file, (str, os.PathLike)) else nullcontext(file) as stream:
            stream.seek(0)
            directory = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
            stream.seek(directory.next)
            directory.load(stream)
            bands, bits = directory[SAMPLES], directory[BITS][0]
    except Exception:  # no TIFF file, or a damaged one
        return ''
    usual = bands in (1, 3) and bits == 8
    return '' if usual else f'it has {bands} bands of {bits} bits; one (grey) or three (RGB) of up to 16 bits are read'


def _check_size(image: Image.Image, size: tuple[int, int]) -> None:
    """Refuse an image that is neither as stored nor as turned by its EXIF orientation of this size, or may be both."""
    turn = _orientation(image, size)
    turned = image.size if turn < 5 or image.format == 'TIFF' else image.size[::-1]
    stored = turned[::-1] if turn >= 5 else turned
    if turn > 1 and size == turned == stored:
        raise ImageError(
            f'has the EXIF orientation {turn}, and its size does not tell whether the annotation is of the image as it '
            'is stored or as it is shown: save it without an orientation')
    if turn > 1 and size == stored and image.format == 'TIFF':
        raise ImageError(
            f'has the orientation {turn} (EXIF) and its annotation is of the image as it is stored, which is not read '
            'from TIFF: save it without an orientation')
    if size not in (stored, turned):
        note = f' (EXIF orientation {turn})' if turn > 1 else ''
        raise ImageError(
            f'is {stored[0]} x {stored[1]}{note}, its annotation says {size[0]} x {size[1]}')


def _orientation(image: Image.Image, size: tuple[int, int]) -> int:
    swapped = size != image.size and size == image.size[::-1]
    if image.format == 'PNG' and not swapped and not any(key in image.info for key in PNG_ORIENTATIONS):
        return 1  # Pillow would decode the image to look behind its pixels
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data, which readers ignore
        return 1
    return found if found in range(2, 9) else 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, which Pillow's conversion would clip at 255."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    largest = 1 if image.mode == 'F' else 65535
    if not (low >= 0 and high <= largest):  # also with NaN
        kind = 'floats' if image.mode == 'F' else 'whole numbers'
        raise ImageError(
            f'cannot be read as an image: its {kind} go from {low:g} to {high:g}; accepted are 0 to {largest}')
    if image.mode == 'F':
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if 255 < high <= TWELVE_BITS:
        warnings.warn(
            f'an image of 16 bits has no value above {high:g}: if it holds 12 bits, multiply them by 16', stacklevel=2)
    return Image.fromarray((values / 257).round().astype(np.uint8))


class CountsUnreadable:
    """A dataset's record of the images that could not be read, shared with its loader processes.

    Attributes:
        unreadable: (length,) bytes in shared memory, 1 where reading failed.
    """

    def __init__(self, length: int):
        self.unreadable = torch.zeros(length, dtype=torch.uint8).share_memory_()

    @property
    def num_unreadable(self) -> int:
        """Number of unreadable images so far."""
        return int(torch.count_nonzero(self.unreadable))

    def describe_unreadable(self) -> str:
        """The first unreadable image, and why it is."""
        index = int(self.unreadable.argmax())
        try:
            self.read(index)
        except Exception as e:  # as when it was read first
            return f'{self.filename(index)}: {first_line(e)}'
        return self.filename(index)

    def filename(self, index: int) -> str:
        """Of an image, counted as in `unreadable`."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """Decode an image."""
        raise NotImplementedError

    def mark_unreadable(self, indices: Tensor) -> None:
        """Mark images that an earlier part of the run found unreadable."""
        self.unreadable[indices] = 1


class StrictImageDataset(CountsUnreadable, Dataset[tuple[Any, int]]):
    """Reads the images of a timm dataset and records which of them are unreadable.

    Args:
        dataset: A dataset of timm whose images can be indexed.
        replace: Replace an unreadable image and its label by the next readable one (for training). Otherwise return a
            black image with the target -1, which no prediction equals (for evaluation).

    Attributes:
        transform: Transform of the images; timm's `create_loader` sets it.
    """

    def __init__(self, dataset: ImageDataset, replace: bool):
        super().__init__(len(dataset))
        self.dataset, self.replace = dataset, replace
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for attempt in range(len(self) if self.replace else 1):
            image, target = self._read((index + attempt) % len(self))
            if image is not None:
                break
        else:
            if self.replace:
                raise RuntimeError(f'none of the {len(self)} images can be read')
            image, target = Image.new(self.dataset.input_img_mode or 'RGB', (32, 32)), UNREADABLE
        return image if self.transform is None else self.transform(image), target

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_names(self) -> list[str] | None:
        """The classes in the order of their numbers; None where they are not known."""
        return class_names(self.dataset)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.dataset.filename(index, basename, absolute)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image and its target, before any transform."""
        file, target, *_ = self.dataset.reader[index]
        return read_image(file, self.dataset.input_img_mode), target

    def _read(self, index: int) -> tuple[Image.Image | None, int]:
        try:
            image, target = self.read(index)
        except MemoryError:
            raise
        except Exception:  # of the file, or of timm's reader
            self.unreadable[index] = 1
            return None, UNREADABLE
        if self.dataset.target_transform is not None:
            target = self.dataset.target_transform(target)
        return image, target
