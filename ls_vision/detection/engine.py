"""What detection adds to the shared training loop: the task, its batches and its evaluation."""
import argparse
from collections.abc import Iterator
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..runtime.errors import UserError
from ..runtime.logs import ProgressBar, say
from ..runtime.processes import Processes
from ..training.sampling import ResumableBatchSampler, create_resumable_loader
from .annotations import Annotations
from .datasets import DetectionDataset, collate, read_pixels
from .evaluation import Detections, evaluate_detections
from .tiling import detect

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class DetectionTask(TrainingTask):
    """A detector with the sum of its losses."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(device=device, verbose=False)
        self.trainable_module = model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> TrainingTask:
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:
        losses = self.trainable_module(input, target)
        return dict(loss=torch.stack(list(losses.values())).sum(), **losses)


class DetectionLoader:
    """Training batches on the device, starting at any batch of any epoch."""

    def __init__(self, dataset: DetectionDataset, args: argparse.Namespace, processes: Processes):
        self.dataset: Any = dataset
        self.device = processes.device
        self.sampler = ResumableBatchSampler(dataset, args.batch_size, args.seed, processes.rank, processes.world_size)
        self.loader = create_resumable_loader(
            dataset, self.sampler, collate, args.workers, pin_memory=processes.device.type == 'cuda')

    def read(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The images, (3, H, W) each, and targets of an epoch, starting at `first_batch`."""
        self.sampler.set_position(epoch, first_batch)
        for images, targets in self.loader:
            yield [image.to(self.device, non_blocking=True) for image in images], [
                {name: value.to(self.device, non_blocking=True) for name, value in target.items()}
                for target in targets]

    def __len__(self) -> int:
        """Batches of a complete epoch."""
        return len(self.loader)


def find_objects(
        model: nn.Module,
        annotations: Annotations,
        args: argparse.Namespace,
        processes: Processes,
) -> dict[int, Detections]:
    """Detections in each image by its id. Every process takes its share of the images and gets all results.

    With `args.skip_bad`, images that cannot be decoded have none, so that their objects count as missed.

    Raises:
        UserError: An image cannot be decoded.
    """
    model.eval()
    mine: dict[int, Detections] = {}
    images = annotations.images[processes.rank::processes.world_size]
    with ProgressBar('evaluation', len(images)) as progress:
        for image in images:
            try:
                pixels = read_pixels(image.path, (image.width, image.height)).to(processes.device).float() / 255
            except UserError:
                if not args.skip_bad:
                    raise
                continue
            found = detect(model, pixels, args.tile_size, args.tile_overlap, max_dets=args.max_dets)
            mine[image.image_id] = {name: value.cpu() for name, value in found.items()}
            progress.update()
    everything = {image_id: part[image_id] for part in processes.gather(mine) for image_id in part}
    missing = len(annotations.images) - len(everything)
    if missing:
        say(f'{missing} of {len(annotations.images)} evaluation images cannot be decoded: '
            'their objects count as missed')
    return everything


def score(annotations: Annotations, found: dict[int, Detections], args: argparse.Namespace) -> dict[str, float]:
    """COCO's metrics of boxes and, for Mask R-CNN on whole images, of masks."""
    metrics = evaluate_detections(annotations, found, args.max_dets)
    if args.detector == 'mask_rcnn' and all('masks' in f for f in found.values()):
        masks = evaluate_detections(annotations, found, args.max_dets, 'segm')
        metrics.update({f'mask_{name}': value for name, value in masks.items()})
    return metrics
