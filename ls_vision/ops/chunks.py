"""Cutting a batch into parts whose copies fit a cache."""
from typing import List

CHUNK_ELEMENTS = 2 ** 19  # 2 MB in float32


def slices(length: int, step: int) -> List[slice]:
    """range(length) in slices of `step`, the last one shorter where it does not fit."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def image_chunks(batch: int, elements: int) -> List[slice]:
    """Images, of so many elements each, in parts of about `CHUNK_ELEMENTS`.

    One image at a time costs a call for each, which is most of the time for small ones; all at once would copy the
    tokens of all.
    """
    return slices(batch, max(CHUNK_ELEMENTS // max(elements, 1), 1))
