"""Measures how models grow with the image, and writes a report of it: a page with plots and tables, and a summary.

    ls-vision scale
    ls-vision scale --resume
    ls-vision scale vil_ls_small_linear convnext_tiny --img-size 224 512 640x1280 2048 --device cuda --dtype bfloat16

Leaves results.json, report.html, scaling.png and summary.md in the folder --out. Every measurement runs in a fresh
process and is on disk as soon as it is made; a model that runs out of memory is a result. A run that was stopped goes
on with --resume, which makes the report anew where nothing is missing.
"""
import argparse
import sys
from pathlib import Path

from ls_vision.analysis import pictures, report, scale
from ls_vision.analysis.commands.bench import add_measuring_arguments, parse_sizes, settings

MODELS = [
    'vil_ls_medium_linear', 'vil_ls_medium', 'vil_full_medium', 'swin_small_patch4_window7_224',
    'vit_small_patch16_224',
]
SIZES = ['224', '448', '672', '896', '1120']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'models', nargs='*', default=MODELS, metavar='MODEL',
        help=f'of this package or of timm (default: {", ".join(MODELS)})')
    parser.add_argument(
        '--img-size', nargs='+', default=SIZES, metavar='SIZE',
        help=f'pixels of a side or HEIGHTxWIDTH (default: {" ".join(SIZES)})')
    parser.add_argument('--out', type=Path, default=Path('output/scale'), help='folder (default: %(default)s)')
    parser.add_argument('--resume', action='store_true', help='go on where a run with the same --out stopped')
    add_measuring_arguments(parser, seconds=3., rounds=2)


def run(args: argparse.Namespace) -> None:
    pictures.check_available()
    points = scale.plan(args.models, parse_sizes(args), args.batch_size, args.mode)
    results = scale.Results.create(args.out / 'results.json', settings(args), args.resume)
    try:
        scale.run(points, results, args.rounds)
    except KeyboardInterrupt:
        done = sum(results.find(point) is not None for point in points)
        print(
            f'Interrupted. {done} of {len(points)} points are in {results.path}; go on with --resume.', file=sys.stderr)
        sys.exit(130)
    print(report.write(results, args.out).read_text())
