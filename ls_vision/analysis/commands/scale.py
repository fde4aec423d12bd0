"""Measures the cost of models over image sizes, and writes a report: a page with plots and tables, and a summary.

    ls-vision scale
    ls-vision scale --resume
    ls-vision scale vil_ls_small_linear convnext_tiny --img-size 224 512 640x1280 2048 --device cuda --dtype bfloat16

Leaves results.json, report.html, scaling.png and summary.md in the folder --out. Every measurement runs in a fresh
process and is saved at once; out-of-memory is recorded as a result. --resume continues an interrupted run; if the run
is complete, it only writes the report again.
"""
import argparse
import sys
from pathlib import Path

from ls_vision.analysis.commands.bench import add_measuring_arguments, settings
from ls_vision.runtime.arguments import image_size

MODELS = [
    'vil_ls_medium_linear', 'vil_ls_medium', 'vil_full_medium', 'swin_small_patch4_window7_224',
    'vit_small_patch16_224',
]
SIZES = [(side, side) for side in (224, 448, 672, 896, 1120)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'models', nargs='*', default=MODELS, metavar='MODEL',
        help=f'models of this package or of timm (default: {", ".join(MODELS)})')
    parser.add_argument(
        '--img-size', type=image_size, nargs='+', default=SIZES, metavar='SIZE',
        help=f'pixels of a side or HEIGHTxWIDTH (default: {" ".join(str(side) for side, _ in SIZES)})')
    parser.add_argument('--out', type=Path, default=Path('output/scale'), help='output folder (default: %(default)s)')
    parser.add_argument('--resume', action='store_true', help='continue an interrupted run with the same --out')
    add_measuring_arguments(parser, seconds=3., rounds=2)


def run(args: argparse.Namespace) -> None:
    from ls_vision.analysis import pictures, report, scale
    from ls_vision.analysis.zoo import check_model

    pictures.check_available()
    for name in args.models:
        check_model(name)
    points = scale.plan(args.models, args.img_size, args.batch_size, args.mode)
    results = scale.Results.create(args.out / 'results.json', settings(args), args.resume)
    try:
        scale.measure_points(points, results, args.rounds)
    except KeyboardInterrupt:
        done = sum(results.find(point) is not None for point in points)
        print(
            f'Interrupted. {done} of {len(points)} points are in {results.path}; continue with --resume.',
            file=sys.stderr)
        sys.exit(130)
    print(report.write(results, args.out).read_text())
