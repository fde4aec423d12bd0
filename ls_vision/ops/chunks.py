"""Cutting a batch into parts whose copies fit a cache."""
from typing import List

CHUNK_ELEMENTS = 2 ** 19  # 2 MB in float32


def slices(length: int, step: int) -> List[slice]:
    """range(length) in slices of `step`; the last one is shorter where `step` does not divide the length."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def image_chunks(batch: int, elements: int) -> List[slice]:
    """A batch of images, of that many elements each, in parts of about `CHUNK_ELEMENTS`.

    One image at a time would spend most of the time on calls where images are small; all at once would copy the tokens
    of all.
    """
    return slices(batch, max(CHUNK_ELEMENTS // max(elements, 1), 1))
