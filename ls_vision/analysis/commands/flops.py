"""Counts the multiply-adds of any timm model, by stage and by kind of operation.

    ls-vision flops vil_ls_medium
    ls-vision flops vil_ls_medium_linear vil_full_medium --img-size 224 1024 4096
    ls-vision flops swin_small_patch4_window7_224 --img-size 640x480 --format json

fvcore's count is checked against PyTorch's FlopCounterMode and against closed formulas of the layers; a
difference of more than 1 %, or an operator that cannot be counted, is an error. Nothing is computed, so large images
need no memory.
"""
import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ls_vision.analysis.tables import FORMATS, comma_separated, giga, json_lines, markdown
from ls_vision.runtime.arguments import image_size

if TYPE_CHECKING:
    from ls_vision.analysis.flops import Count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', nargs='+', metavar='MODEL', help='name of a model of this package or of timm')
    parser.add_argument(
        '--img-size', type=image_size, nargs='+', metavar='SIZE',
        help="pixels of a side or HEIGHTxWIDTH, one or several (default: the model's own size)")
    parser.add_argument('--format', choices=FORMATS, default='markdown', help='output format (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ls_vision.analysis.flops import count
    from ls_vision.analysis.zoo import check_model, default_size

    for name in args.models:
        check_model(name)
    pairs = [(name, size) for name in args.models for size in args.img_size or [default_size(name)]]
    counts = [count(*pair) for pair in tqdm(pairs, desc='counting', unit='model', leave=False, disable=None)]
    if args.format == 'markdown':
        print(report(counts))
    else:
        rows = [as_row(result) for result in counts]
        print(json_lines(rows) if args.format == 'json' else comma_separated(rows))


def as_row(result: 'Count') -> dict[str, Any]:
    """All entries of a count; `img_size` is a number for a square image, otherwise [height, width]."""
    height, width = result.img_size
    return dict(asdict(result), img_size=height if height == width else [height, width])


def report(counts: 'list[Count]') -> str:
    """A report by kind of operation and by stage, in GMAC."""
    from ls_vision.analysis.formulas import PARTS
    from ls_vision.analysis.zoo import size_name

    head = {
        'model': lambda c: c.model,
        'img size': lambda c: size_name(c.img_size),
        'parameters, M': lambda c: f'{c.params / 1e6:.2f}',
        'GMAC': lambda c: giga(c.macs),
    }
    by_part = {part: (lambda c, part=part: giga(c.parts[part])) for part in PARTS}
    text = [markdown(counts, {**head, **by_part}), '']
    for result in counts:
        stages = ', '.join(f'{name} {giga(macs)}' for name, macs in result.stages.items() if macs)
        checked = ' and '.join(
            name for name, macs in (('FlopCounterMode', 0), ('closed formulas', result.counters['formula']))
            if macs is not None)
        text.append(f'{result.model} at {size_name(result.img_size)}: {stages}; {checked} agree.')
        if result.without_formula:
            text.append(f'  No closed formula for {", ".join(result.without_formula)}.')
    return '\n'.join(text)
