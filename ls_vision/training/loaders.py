"""timm's datasets and loaders from a script's arguments, with checks that timm lacks."""
import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, ImageDataset, create_dataset, create_loader
from torch import Tensor
from torch.utils.data import IterableDataset

from ..data.folders import check_class_map, class_names, class_to_idx, find_split, read_class_map, shorten
from ..data.images import StrictImageDataset
from ..data.readers import SUFFIXES, image_mode, open_images
from ..evaluation.loader import create_eval_loader, shared_options
from ..runtime.errors import UserError, first_line
from ..runtime.logs import say
from ..runtime.processes import Processes
from ..runtime.randomness import derive_seed
from .sampling import ResumableBatchSampler, create_resumable_loader


@dataclass
class Datasets:
    """The two splits, which count unreadable images, and their class names where the reader knows them."""

    train: Any
    val: Any
    class_names: list[str] | None


def create_datasets(args: argparse.Namespace) -> Datasets:
    """Open both splits and check that their classes agree."""
    if args.dataset:
        train, val = _open(args, args.train_split), _open(args, args.val_split)
        return Datasets(_strict(train, replace=True), _strict(val, replace=False), class_names(train))

    train_dir, val_dir = (find_split(args.data_dir, split) for split in (args.train_split, args.val_split))
    train, val = _open_folder(args, train_dir), _open_folder(args, val_dir)
    present = list(class_to_idx(train))
    if args.class_map:
        names = read_class_map(args.class_map, train_dir)
        unused = check_class_map(names, present, args.class_map, train_dir)
        if unused:
            say(f'{train_dir} has no images of {len(unused)} classes of {args.class_map}: {shorten(unused)}')
        train.reader.number(names)
    classes, found = class_to_idx(train), class_to_idx(val)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise UserError(
            f'{val_dir} has {len(unknown)} classes that {train_dir} lacks, e.g. {unknown[:3]}: both need the same '
            'class folders')
    missing = [name for name in present if name not in found]
    if missing:
        say(f'{val_dir} has no images of {len(missing)} of the {len(present)} classes of training: {shorten(missing)}')
    # Numbered on its own, an evaluation split that lacks a class would number the others wrongly.
    val.reader.number(classes)
    return Datasets(_strict(train, replace=True), _strict(val, replace=False), class_names(train))


def resolve_num_classes(args: argparse.Namespace, datasets: Datasets) -> int:
    """The number of classes: the dataset's, which an explicit one must match."""
    if datasets.class_names is None:
        if args.num_classes is None:
            raise UserError(f'dataset {args.dataset} does not say how many classes it has: pass --num-classes')
        return args.num_classes
    found = len(datasets.class_names)
    if args.num_classes not in (None, found):
        raise UserError(
            f'--num-classes {args.num_classes} does not fit {args.data_dir or args.dataset}, which has {found} '
            f'classes: pass --num-classes {found} or leave it out')
    return found


class TrainLoader:
    """Training batches, starting at any batch of any epoch.

    The order and augmentation of images that can be indexed depend only on the seed, the epoch and their position in
    it. Streams of shards are read from the start of the epoch, and batches that are done are skipped. Random erasing
    happens when a batch is handed out, with the same generators as the model's own randomness.
    """

    def __init__(self, loader: Any, mixup: FastCollateMixup | None, args: argparse.Namespace, processes: Processes):
        self.loader, self.mixup = loader, mixup
        self.seed, self.rank = args.seed, processes.rank
        self.mixup_off_epoch = args.mixup_off_epoch
        self.erasing, loader.random_erasing = loader.random_erasing, None
        self.sampler: ResumableBatchSampler | None = None
        if isinstance(loader.dataset, IterableDataset):
            loader.loader.generator = torch.Generator()
        else:
            self.sampler = ResumableBatchSampler(
                loader.dataset, args.batch_size, args.seed, processes.rank, processes.world_size, args.aug_repeats)
            loader.loader = create_resumable_loader(
                loader.dataset, self.sampler, loader.loader.collate_fn, args.workers, loader.loader.pin_memory)

    def read(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (B, C, H, W) and targets of an epoch, on the device, starting at `first_batch`."""
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
        if self.sampler is not None:
            self.sampler.set_position(epoch, first_batch)
            batches = iter(self.loader)
        else:
            self.loader.dataset.set_epoch(epoch)
            self.loader.loader.generator.manual_seed(derive_seed(self.seed, epoch, self.rank))
            batches = islice(iter(self.loader), first_batch, None)
        for images, targets in batches:
            yield images if self.erasing is None else self.erasing(images), targets

    def __len__(self) -> int:
        """Batches of a complete epoch."""
        return len(self.loader)

    @property
    def dataset(self) -> Any:
        """The dataset; a StrictImageDataset where images can be indexed."""
        return self.loader.dataset if self.sampler is None else self.loader.dataset.dataset


def create_loaders(
        args: argparse.Namespace,
        datasets: Datasets,
        data_config: dict[str, Any],
        num_classes: int,
        processes: Processes,
) -> tuple[TrainLoader, Any]:
    """The training and the evaluation loader."""
    images_at_once = args.batch_size * processes.world_size
    if hasattr(datasets.train, '__getitem__') and len(datasets.train) < images_at_once:
        raise UserError(
            f'--batch-size {args.batch_size}{f" of {processes.world_size} processes" * (processes.world_size > 1)} '
            f'exceeds the {len(datasets.train)} training images of {args.data_dir or args.dataset}')
    if args.aug_repeats and isinstance(datasets.train, IterableDataset):
        raise UserError(f'--aug-repeats {args.aug_repeats:g}: a stream of shards gives every image once')
    mixup = _create_mixup(args, num_classes)
    train_loader = create_loader(
        datasets.train,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        interpolation=args.train_interpolation if not args.no_aug else data_config['interpolation'],
        collate_fn=mixup,
        **shared_options(datasets.train, args.workers, data_config, processes.device),
    )
    val_loader = create_eval_loader(
        datasets.val, args.validation_batch_size or args.batch_size, args.workers, data_config, processes)
    return TrainLoader(train_loader, mixup, args, processes), val_loader


def _strict(dataset: Any, replace: bool) -> Any:
    """Count unreadable images where the dataset is one of image files."""
    return StrictImageDataset(dataset, replace) if isinstance(dataset, ImageDataset) else dataset


def measure_loader(name: str, batches: Iterable[tuple[Any, Any]], seconds: float = 30) -> float:
    """Images per second of a loader alone, measured for at most `seconds`.

    The first batch is not counted where there are others: the workers start once per epoch.
    """
    start, count = time.perf_counter(), 0
    after_first = start
    for i, (images, _) in enumerate(batches):
        if i == 0:
            after_first = time.perf_counter()
        elif i == 1:
            start, count = after_first, 0
        count += len(images)
        if time.perf_counter() - start > seconds:
            break
    rate = count / (time.perf_counter() - start)
    say(f'{name} loader: {rate:,.0f} images/s over {count:,} images, from file to normalised batch')
    return rate


def uses_mixup(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0


def _create_mixup(args: argparse.Namespace, num_classes: int) -> FastCollateMixup | None:
    if not uses_mixup(args):
        return None
    return FastCollateMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def _open_folder(args: argparse.Namespace, folder: Path) -> ImageDataset:
    """The images of a folder or tar archive, with what the user should know about it."""
    dataset = open_images(folder, args.input_key.split(';') if args.input_key else SUFFIXES)
    dataset.input_img_mode = image_mode(args.model_kwargs)
    for note in dataset.reader.notes:
        say(note)
    return dataset


def _open(args: argparse.Namespace, split: str) -> Any:
    """A named dataset of timm."""
    is_training = split == args.train_split
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            class_map=args.class_map,
            input_img_mode=image_mode(args.model_kwargs),
            is_training=is_training,
            batch_size=args.batch_size,
            seed=args.seed,
            download=args.dataset_download,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            **{key: value for key in ('input_key', 'target_key') if (value := getattr(args, key))},
        )
    except (RuntimeError, OSError, ValueError, ImportError, AssertionError) as e:
        raise UserError(f'{args.dataset}: {first_line(e)}') from e
