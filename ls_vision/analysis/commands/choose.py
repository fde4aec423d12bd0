"""Lists the models that fit an image size and a memory on this machine, fastest first.

    ls-vision choose --img-size 512
    ls-vision choose --img-size 1024x2048 --memory 24GiB --train
    ls-vision choose --img-size 640 --memory 8GiB --models 'vil_ls_*' 'convnext_*' --seconds 20 --json choice.json

Memory is the peak of weights, gradients, optimiser and activations. Time and memory are measured in fresh processes
where that is quick and fits. Otherwise time is measured at smaller sizes and extrapolated by multiply-adds, and memory
is predicted; the table says which. Models that do not fit or cannot run are listed with the reason. Accuracy is the
published one of ImageNet-1k at the size in brackets; it says nothing about other sizes.
"""
import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ls_vision.analysis.commands.bench import add_device_arguments, settings
from ls_vision.analysis.tables import giga, markdown
from ls_vision.runtime.arguments import image_size, parse_memory, positive_int, positive_number
from ls_vision.runtime.files import check_output, write_text

if TYPE_CHECKING:
    from ls_vision.analysis.choose import Candidate

COLUMNS = {
    'model': lambda c: c.model,
    'ms': lambda c: f'{c.seconds(c.point) * 1e3:.0f}',
    'images/s': lambda c: f'{c.wish.batch_size / c.seconds(c.point):.3g}',
    'time': lambda c: 'measured' if c.is_measured else f'estimated, {_name(c.last)}',
    'peak, GiB': lambda c: f'{c.memory / 2 ** 30:.2f}',
    'memory': lambda c: 'measured' if c.is_measured else 'predicted',
    'GMAC': lambda c: giga(c.macs),
    'parameters, M': lambda c: f'{c.params / 1e6:.1f}',
    'top-1, % (px)': lambda c: c.published and f'{c.published.top1} ({c.published.px})',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser._negative_number_matcher = re.compile(r'-\.?\d')  # as in Python 3.14, so that -8GiB is taken for a value
    parser.add_argument(
        '--img-size', type=image_size, required=True, metavar='SIZE', help='pixels of a side or HEIGHTxWIDTH')
    parser.add_argument('--memory', metavar='SIZE', help='for example 24GiB or 500MB (default: what is free)')
    parser.add_argument('--train', action='store_true', help='a training step with AdamW; inference without it')
    parser.add_argument('--batch-size', type=positive_int, default=1, metavar='N', help='default: %(default)s')
    parser.add_argument(
        '--models', nargs='+', metavar='PATTERN',
        help="names or patterns, 'vil_ls_*' (default: this package's, and Swin, ConvNeXt, ResNet-50 and ViT of timm)")
    add_device_arguments(parser)
    parser.add_argument(
        '--seconds', type=positive_number, default=1.5,
        help='time of each of two measurements; a size at which one call would take longer is estimated '
        '(default: %(default)s)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures, too')
    parser.set_defaults(memory_limit=None)


def run(args: argparse.Namespace) -> None:
    memory = None if args.memory is None else parse_memory(args.memory, '--memory')
    if args.json is not None:
        check_output(args.json, '--json')

    import torch

    from ls_vision.analysis.choose import Candidate, Wish, compare
    from ls_vision.analysis.measure import describe_machine
    from ls_vision.analysis.worker import available_memory
    from ls_vision.analysis.zoo import PUBLISHED, find_models, own_models

    names = find_models(args.models) if args.models else list(dict.fromkeys([*own_models(), *PUBLISHED]))
    how = settings(args)
    torch.set_num_threads(how.threads)  # for what is counted in this process
    free = how.memory_limit if args.device == 'cpu' else available_memory(args.device) or 0
    wish = Wish(args.img_size, args.batch_size, 'training' if args.train else 'inference', memory or free)
    candidates = [Candidate(name, wish) for name in names]
    machine = describe_machine(args.device, args.dtype, how.threads)
    try:
        compare(candidates, how, free)
    finally:
        if any(candidate.is_choice for candidate in candidates):
            print(report(candidates, machine), flush=True)
        if args.json is not None:
            rows = [candidate.as_dict() for candidate in candidates]
            write_text(args.json, json.dumps(dict(machine=machine, rows=rows), indent=1) + '\n')


def report(candidates: 'Sequence[Candidate]', machine: dict[str, Any]) -> str:
    """The table of choices, the others with their reasons, and what was measured and how."""
    from ls_vision.analysis.choose import memory_name
    from ls_vision.analysis.zoo import size_name

    choices = sorted((c for c in candidates if c.is_choice), key=lambda c: c.seconds(c.point))
    lines = [markdown(choices, COLUMNS), '']
    others = [c for c in candidates if c.reason is not None]
    if others:
        lines += ['Not among them:', *(f'  {c.model}: {c.reason}' for c in others), '']
    missing = sum(not c.is_examined for c in candidates)
    if missing:
        lines += [f'Not examined: {missing} of {len(candidates)} models.', '']
    wish = candidates[0].wish
    size = size_name(wish.img_size)
    weights = [c.published.weights for c in choices if c.published and c.published.weights]
    return '\n'.join([
        *lines,
        f'{wish.mode.capitalize()} at {size}, batch {wish.batch_size}, {machine["dtype"]}, in at most '
        f'{memory_name(wish.memory)}; {machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}.',
        'Estimated times are extrapolated by multiply-adds, from sizes up to the named one; they tend to be low.',
        f'Top-1 is of ImageNet-1k at the size in brackets, as published; it says nothing about {size}.',
        *([f"It belongs to timm's {', '.join(weights)}."] if weights else [])])


def _name(point: Any) -> str:
    from ls_vision.analysis.zoo import size_name

    return size_name(point.img_size) + (f' x {point.batch_size}' if point.batch_size > 1 else '')
