#!/usr/bin/env python3
"""Evaluate an image classifier, any of timm's, on ImageNet, one of its variants, or any folder of images.

    python eval_imagenet.py --model vil_ls_medium --checkpoint model_best.pth.tar --data-dir imagenet
    python eval_imagenet.py --model vil_ls_medium --pretrained --data-dir imagenet-a --variant a --results-file a.json
    python eval_imagenet.py --model vil_ls_medium_384 --checkpoint last.pth.tar --data-dir imagenet-c --variant c
    python eval_imagenet.py --model vil_ls_tiny --num-classes 10 --checkpoint last.pth.tar --data-dir mine/val
    torchrun --nproc_per_node 8 eval_imagenet.py ...        # exactly the same metrics
    torchrun --nproc_per_node 8 eval_imagenet.py --img-size 4096 --space-parallel 8 ...  # each image over 8 processes

Prints top-1, top-5 and the number of images as a Markdown row, and writes them to the files that `--results-file`
names, as JSON, CSV or Markdown by their suffixes. An unreadable image counts as wrong.
"""
import argparse
import csv
import io
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # see train_imagenet.py
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from timm.data import create_dataset, resolve_input_data_config
from torch import nn

from ls_vision.data.folders import SPLIT_FOLDERS, class_to_idx, is_split, shorten
from ls_vision.data.images import StrictImageDataset
from ls_vision.data.readers import image_mode, open_images
from ls_vision.evaluation import imagenet
from ls_vision.evaluation.classifier import create_classifier, read_class_names
from ls_vision.evaluation.loader import create_eval_loader
from ls_vision.evaluation.predictions import Predictions, accuracy, predict
from ls_vision.models._checkpoint import load_weights
from ls_vision.parallel.scripts import add_space_parallel, share_images, split_model
from ls_vision.runtime.arguments import KeyValues, parse_strictly
from ls_vision.runtime.devices import autocast, check_device
from ls_vision.runtime.errors import UserError, first_line
from ls_vision.runtime.files import write_text
from ls_vision.runtime.logs import say
from ls_vision.runtime.processes import Processes
from ls_vision.runtime.scripts import run_script

SUFFIXES = ('.json', '.csv', '.md')
COLUMNS = ('model', 'variant', 'img_size', 'top1', 'top5', 'mce', 'images', 'unreadable')


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate, print and write; returns the metrics."""
    return run_script(parse_args, evaluate, argv)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments, which have timm's names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add('--data-dir', metavar='DIR', help='dataset folder: one sub-folder per class, or per split above them; or a tar')
    add('--dataset', default='', help='timm dataset name, e.g. hfds/...; empty reads a folder or tar')
    add('--split', default='validation', help='split of such a dataset (%(default)s)')
    add('--variant', default='val', choices=imagenet.VARIANTS, help='kind of ImageNet (%(default)s)')
    add('--model', default='vil_ls_tiny', help='timm model name (%(default)s)')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, help='constructor arguments, k=v')
    add('--num-classes', type=int, default=imagenet.NUM_CLASSES, help="the model's classes (%(default)s)")
    add('--checkpoint', default='', metavar='PATH', help='weight file; its averaged weights where it has them')
    add('--pretrained', action='store_true', help='evaluate the published weights')
    add('--img-size', type=int, help="image size; the model's own if not set")
    add('--crop-pct', type=float, help="crop / resize ratio; the model's own if not set, as the three below")
    add('--mean', type=float, nargs='+', help='pixel mean')
    add('--std', type=float, nargs='+', help='pixel standard deviation')
    add('--interpolation', default='', help='resize')
    add('-b', '--batch-size', type=int, default=256, help='batch of one process (%(default)s)')
    add_space_parallel(parser)
    add('-j', '--workers', type=int, default=4, help='loader processes (%(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='torch device (%(default)s)')
    add('--amp', action='store_true', help='automatic mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its lower precision (%(default)s)')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--results-file', nargs='+', default=[], metavar='PATH', help='.json, .csv or .md files to write')
    args = parse_strictly(parser, argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or mislead, only after the evaluation."""
    if not args.data_dir and not args.dataset:
        raise UserError('no data: pass --data-dir (a folder with one sub-folder per class)')
    if args.data_dir and not Path(args.data_dir).exists():
        raise UserError(f'--data-dir {args.data_dir} does not exist')
    if bool(args.checkpoint) == args.pretrained:
        raise UserError('pass either --checkpoint or --pretrained: random weights have no accuracy')
    for name in ('num_classes', 'img_size', 'batch_size', 'space_parallel'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be 1 or more')
    if args.variant != 'val' and args.num_classes != imagenet.NUM_CLASSES:
        raise UserError(f'--variant {args.variant} is for models of 1000 classes, not --num-classes {args.num_classes}')
    for path in args.results_file:
        if Path(path).suffix not in SUFFIXES:
            raise UserError(f'--results-file {path}: the suffix must be one of {", ".join(SUFFIXES)}')
        if not Path(path).parent.is_dir():
            raise UserError(f'--results-file {path}: its folder does not exist')
    image_mode(args.model_kwargs)
    check_device(args.device)


def evaluate(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job for checked arguments."""
    processes = share_images(processes, args.space_parallel)
    model = create_classifier(args, args.num_classes)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    class_names = read_class_names(args.checkpoint) if args.checkpoint else None
    model.to(processes.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data_config = resolve_input_data_config(model, args=vars(args))
    split_model(model, processes, data_config['input_size'])

    evaluate_on = partial(evaluate_folder, args, processes, model, data_config, class_names)
    if args.variant == 'c':
        metrics = evaluate_corruptions(Path(args.data_dir), evaluate_on)
    else:
        metrics, _ = evaluate_on(find_classes(args, class_names), title=args.variant)
    result = dict(
        model=args.model, variant=args.variant, img_size=data_config['input_size'][-1], **metrics,
        checkpoint=args.checkpoint or None, crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'], parameters=sum(p.numel() for p in model.parameters()))
    report(result, args.results_file, processes)
    return result


def find_classes(args: argparse.Namespace, class_names: list[str] | None) -> Path | None:
    """The folder with one sub-folder per class: --data-dir, or its validation split; None for a named dataset."""
    if args.dataset:
        return None
    root = Path(args.data_dir)
    return next((root / name for name in SPLIT_FOLDERS['validation'] if is_split(root / name, class_names)), root)


def evaluate_folder(
        args: argparse.Namespace,
        processes: Processes,
        model: nn.Module,
        data_config: dict[str, Any],
        class_names: list[str] | None,
        folder: Path | None,
        title: str,
) -> tuple[dict[str, float], Predictions]:
    """Metrics of one set of images, and its predictions."""
    classes = imagenet.subset(args.variant)
    dataset = open_dataset(args, folder, classes, class_names)
    loader = create_eval_loader(dataset, args.batch_size, args.workers, data_config, processes)
    predictions = predict(
        model, loader, processes, classes, partial(autocast, processes.device, args.amp, args.amp_dtype), title=title)
    if args.variant == 'real':
        return imagenet.real_accuracy(
            predictions, (dataset.filename(i, basename=True) for i in range(len(dataset)))), predictions
    return accuracy(predictions), predictions


def open_dataset(
        args: argparse.Namespace,
        folder: Path | None,
        classes: torch.Tensor | None,
        class_names: list[str] | None,
) -> Any:
    """The images, with targets among the model's classes or, for a variant with fewer, among its classes."""
    mode = image_mode(args.model_kwargs)
    if folder is None:
        try:
            return create_dataset(
                args.dataset, root=args.data_dir, split=args.split, batch_size=args.batch_size, input_img_mode=mode)
        except (RuntimeError, OSError, ValueError, ImportError, AssertionError) as e:
            raise UserError(f'{args.dataset}: {first_line(e)}') from e
    dataset = open_images(folder)
    dataset.input_img_mode = mode
    found = class_to_idx(dataset)
    dataset.reader.number(imagenet.class_map(found, args.num_classes, classes, class_names))
    missing = [name for name in class_names or () if name not in found]
    if classes is None and 0 < len(missing) < args.num_classes:
        dataset.reader.notes.append(
            f"{folder} has no images of {len(missing)} of the model's {args.num_classes} classes: {shorten(missing)}")
    for note in dataset.reader.notes:
        say(note)
    return StrictImageDataset(dataset, replace=False)


def evaluate_corruptions(root: Path, evaluate_on: Any) -> dict[str, Any]:
    """ImageNet-C: mean corruption error, and accuracy over the images of all corruptions."""
    metrics = {}
    for (corruption, severity), folder in imagenet.corruption_folders(root).items():
        title = f'{corruption} {severity}'
        metrics[corruption, severity], _ = evaluate_on(folder, title=title)
        say(f'{title}: top-1 {metrics[corruption, severity]["top1"]:.2f} %')
    errors = imagenet.mean_corruption_error({key: found['top1'] for key, found in metrics.items()})
    images = sum(found['images'] for found in metrics.values())
    means = {
        name: sum(found[name] * found['images'] for found in metrics.values()) / images for name in ('top1', 'top5')}
    return dict(
        **means, mce=errors.pop('mce'), images=images,
        unreadable=sum(found['unreadable'] for found in metrics.values()), corruption_errors=errors)


def report(result: dict[str, Any], paths: list[str], processes: Processes) -> None:
    """Print the metrics and write the files."""
    row = {name: result[name] for name in COLUMNS if name in result}
    text = {'.json': json.dumps(result, indent=1) + '\n', '.csv': csv_text(row), '.md': markdown(row)}
    say(text['.md'].rstrip())
    if result['unreadable']:
        say(f'{result["unreadable"]:,} of {result["images"]:,} images could not be read; they count as wrong')
    if processes.is_primary:
        for path in map(Path, paths):
            write_text(path, text[path.suffix])


def csv_text(row: dict[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, row, lineterminator='\n')
    writer.writeheader()
    writer.writerow(row)
    return file.getvalue()


def markdown(row: dict[str, Any]) -> str:
    cells = [f'{value:.3f}' if isinstance(value, float) else f'{value:,}' if isinstance(value, int) else value
             for value in row.values()]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (row, ['---'] * len(row), cells)) + '\n'


if __name__ == '__main__':
    main()
