"""From arguments to timm's datasets and loaders, with the checks that timm leaves out."""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, create_dataset, create_loader

from .errors import UserError, first_line

# The names under which timm looks for a split's folder.
SPLIT_FOLDERS = {
    'train': ('train', 'training'),
    'validation': ('val', 'valid', 'validation', 'eval', 'evaluation'),
}


@dataclass
class Datasets:
    """The two splits and, where the reader tells, their class names by index."""

    train: Any
    val: Any
    class_names: list[str] | None


def create_datasets(args: argparse.Namespace) -> Datasets:
    """Open both splits and check that they hold images of the same classes."""
    if args.dataset:
        train, val = _open(args, args.train_split), _open(args, args.val_split)
        return Datasets(train, val, _class_names(train))

    train_dir, val_dir = (find_split(args.data_dir, split) for split in (args.train_split, args.val_split))
    train = _open(args, args.train_split, train_dir)
    classes = train.reader.class_to_idx
    found = _open(args, args.val_split, val_dir).reader.class_to_idx
    unknown = sorted(found.keys() - classes.keys())
    if unknown:
        raise UserError(
            f'{val_dir} has {len(unknown)} classes that {train_dir} lacks, e.g. {unknown[:3]}: both need the same '
            'class folders')
    # Each folder alone would number its classes from 0, wrongly where the evaluation split lacks one.
    val = _open(args, args.val_split, val_dir, class_map=classes)
    return Datasets(train, val, _class_names(train))


def find_split(data_dir: str, split: str) -> Path:
    """The folder of a split, which must exist; timm itself would silently read the whole of `data_dir` for it."""
    root = Path(data_dir)
    if root.is_file():
        return root  # a tar archive
    if not root.is_dir():
        raise UserError(f'--data-dir {data_dir} does not exist; it must hold one folder per split, e.g. train and val')
    names = next((names for names in SPLIT_FOLDERS.values() if split in names), ())
    for name in dict.fromkeys((split, *names)):
        if (root / name).exists():
            return root / name
    present = ', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'
    raise UserError(
        f'--data-dir {data_dir} has no folder for split {split!r} (looked for {", ".join((split, *names))}); '
        f'it holds {present}')


def resolve_num_classes(args: argparse.Namespace, datasets: Datasets) -> int:
    """The number of classes: the dataset's, which an explicit one must match."""
    if datasets.class_names is None:
        if args.num_classes is None:
            raise UserError(f'dataset {args.dataset} does not tell its number of classes: pass --num-classes')
        return args.num_classes
    found = len(datasets.class_names)
    if args.num_classes not in (None, found):
        raise UserError(
            f'--num-classes {args.num_classes} does not fit {args.data_dir or args.dataset}, which has {found} '
            f'classes: pass --num-classes {found} or leave it out')
    return found


def create_loaders(
        args: argparse.Namespace,
        datasets: Datasets,
        data_config: dict[str, Any],
        num_classes: int,
) -> tuple[Any, Any]:
    """The training and the evaluation loader."""
    if hasattr(datasets.train, '__getitem__') and len(datasets.train) < args.batch_size:
        raise UserError(
            f'--batch-size {args.batch_size} exceeds the {len(datasets.train)} training images of '
            f'{args.data_dir or args.dataset}')
    device = torch.device(args.device)
    shared = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=device.type == 'cuda',
        device=device,
    )
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
        collate_fn=_create_mixup(args, num_classes),
        **shared,
    )
    val_loader = create_loader(
        datasets.val,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **shared,
    )
    return train_loader, val_loader


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


def _open(args: argparse.Namespace, split: str, folder: Path | None = None, class_map: Any = None) -> Any:
    try:
        return create_dataset(
            args.dataset,
            root=str(folder or args.data_dir),
            split=split,
            search_split=folder is None,
            class_map=class_map,
            is_training=split == args.train_split,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f'{folder or args.dataset}: {first_line(e)}') from e


def _class_names(dataset: Any) -> list[str] | None:
    if hasattr(dataset, 'classes'):  # torchvision
        return [str(name) for name in dataset.classes]
    mapping = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if not mapping:
        return None
    return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
