"""Strict reading of image files: every file that cannot be decoded is counted.

timm's dataset silently replaces an unreadable image and its label by the next one, in evaluation too.
"""
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

UNREADABLE = -1  # the target of an image that could not be read


class StrictImageDataset(Dataset[tuple[Any, int]]):
    """Reads the images of a timm dataset and records which of them are unreadable.

    Args:
        dataset: A dataset of timm whose images can be indexed.
        replace: Replace an unreadable image and its label by the next readable one (for training). Otherwise return a
            black image with the target -1, which no prediction equals (for evaluation).

    Attributes:
        transform: Transform of the images; timm's `create_loader` sets it.
        unreadable: (len,) bytes in memory shared with the loader processes, 1 where reading failed.
    """

    def __init__(self, dataset: ImageDataset, replace: bool):
        self.dataset, self.replace = dataset, replace
        self.transform: Any = None
        self.unreadable = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

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

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.dataset.filename(index, basename, absolute)

    @property
    def num_unreadable(self) -> int:
        """Number of unreadable images so far."""
        return int(torch.count_nonzero(self.unreadable))

    def mark_unreadable(self, indices: Tensor) -> None:
        """Mark images that an earlier part of the run found unreadable."""
        self.unreadable[indices] = 1

    def _read(self, index: int) -> tuple[Image.Image | None, int]:
        try:
            file, target, *_ = self.dataset.reader[index]
            image = read_image(file, self.dataset.input_img_mode)
        except MemoryError:
            raise
        except Exception:  # Pillow raises many kinds of errors for damaged files
            self.unreadable[index] = 1
            return None, UNREADABLE
        if self.dataset.target_transform is not None:
            target = self.dataset.target_transform(target)
        return image, target


def read_image(file: Any, mode: str = 'RGB') -> Image.Image:
    """Decode an image, the first frame of an animated one, to 8 bits per channel.

    Args:
        file: Path or file.
        mode: Pillow's name of the colour mode; empty keeps the file's.
    """
    with Image.open(file) as image:
        image.load()
        if image.mode.startswith('I'):  # 16 bits, which Pillow's conversion would clip at 255
            grey = np.asarray(image).astype(np.float32)
            image = Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8))
        return image.convert(mode) if mode else image.copy()
