"""Peak memory of a model at sizes that are too large to try: counted or measured at small sizes, then extrapolated.

Activations grow with the pixels of an image, and with their square where full attention keeps its weights.
"""
from collections.abc import Mapping

import torch
from numpy.polynomial import Polynomial
from torch.multiprocessing.reductions import StorageWeakRef

from ls_vision.analysis.flops import count_quickly
from ls_vision.analysis.worker import Settings, training_loss
from ls_vision.analysis.zoo import ImageSize, build

SIDES = (112, 224, 336)  # multiples of patches of 14 and 16 pixels, and of Swin's windows


def training_memory(name: str, size: ImageSize, batch_size: int, settings: Settings) -> int:
    """Bytes of a training step at its peak: weights, gradients, AdamW's two moments, and what is saved for backward.

    What is saved is counted in real forward passes of one or two images, and so depends on the kernels that run here.

    Raises:
        UserError: The model does not take images of `SIDES` or of the size.
    """
    images = min(batch_size, 2)  # batch norms of a 1 x 1 map want two
    saved = {float(side * side): saved_bytes(name, side, images, settings) / images for side in SIDES}
    if settings.device == 'cuda':
        torch.cuda.empty_cache()  # other processes measure
    activations = extrapolate(saved, size[0] * size[1], grows_faster(name, (SIDES[1], SIDES[1]), size))
    return round(4 * torch.float32.itemsize * count_parameters(name, size) + batch_size * activations)


def inference_memory(
        name: str, size: ImageSize, batch_size: int, measured: Mapping[ImageSize, int], settings: Settings) -> int:
    """Bytes of a forward pass at its peak, from those that were measured with one image at smaller sizes."""
    weights = getattr(torch, settings.dtype).itemsize * count_parameters(name, size)
    peaks = {float(height * width): float(peak) for (height, width), peak in measured.items()}
    one_image = extrapolate({0.: weights, **peaks}, size[0] * size[1], grows_faster(name, min(measured), size))
    return round(weights + batch_size * max(one_image - weights, 0))


def extrapolate(values: Mapping[float, float], pixels: int, quadratic: bool) -> float:
    """The value at a number of pixels: on the line through the last two or, not below it, on the last three's parabola.

    Args:
        values: By number of pixels.
        pixels: Where the value is wanted.
        quadratic: Whether to use the parabola.
    """
    known = sorted(values)
    degrees = (1, 2) if quadratic and len(known) > 2 else (1,)
    return max(
        float(Polynomial.fit(known[-degree - 1:], [values[x] for x in known[-degree - 1:]], degree)(pixels))
        for degree in degrees)


def grows_faster(name: str, small: ImageSize, size: ImageSize) -> bool:
    """Whether multiply-adds grow faster than pixels, as those of full attention do."""
    per_pixel, before = (count_quickly(name, s) / (s[0] * s[1]) for s in (size, small))
    return per_pixel > 1.02 * before


def count_parameters(name: str, size: ImageSize) -> int:
    """Number of a model's parameters."""
    return sum(p.numel() for p in build(name, size, device='meta').parameters())


def saved_bytes(name: str, side: int, batch_size: int, settings: Settings) -> int:
    """Bytes that the forward pass of a training step on square images saves for backward, without the weights.

    They are counted, not kept. A weak reference's address is that of one storage for as long as the reference lives.
    """
    model = build(name, (side, side), device=settings.device).train()
    weights = {StorageWeakRef(t.untyped_storage()).cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in weights:
            saved[reference.cdata] = reference, storage.nbytes()

    images = torch.randn(batch_size, 3, side, side, device=settings.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        training_loss(model, images, settings)
    return sum(size for _, size in saved.values())
