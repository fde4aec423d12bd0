#!/usr/bin/env python3
"""Long-short and full attention over image sizes, as in the paper, with Swin and ViT from timm for comparison.

    python benchmarks/resolution_scaling.py                  # ViL family, Swin-S, ViT-S: under 30 minutes on two cores
    python benchmarks/resolution_scaling.py --resume
    python benchmarks/resolution_scaling.py --family cvt
    python benchmarks/resolution_scaling.py --device cuda --dtype bfloat16

Runs `ls-vision scale` with preset models and sizes. Results go to a dated folder in benchmarks/results/. --publish also
copies the plot to docs/scaling.png and writes the tables into docs/results.md, between its markers.
"""
import argparse
import datetime
import shutil
from pathlib import Path

from pages import replace_section

from ls_vision.analysis import report
from ls_vision.analysis.commands import scale
from ls_vision.analysis.scale import Results
from ls_vision.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / 'results'
FAMILIES = {
    'vil': scale.MODELS,
    'cvt': ['cvt_ls_13', 'cvt_13', 'cvt_ls_21', 'cvt_21'],
}
SIZES = {'cpu': [(side, side) for side in (224, 448, 672, 896, 1024, 1120)]}
SIZES['cuda'] = [*SIZES['cpu'], (1792, 1792)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', choices=FAMILIES, default='vil', help='default: %(default)s')
    parser.add_argument('--publish', action='store_true', help='write plot and tables into docs/')
    scale.add_arguments(parser)
    parser.set_defaults(models=None, img_size=None, out=None)
    args = parser.parse_args()
    args.models = args.models or FAMILIES[args.family]
    args.img_size = args.img_size or SIZES[args.device]
    name = f'scaling_{args.family}_{args.device}_{args.dtype}_{datetime.date.today()}'
    args.out = args.out or RESULTS / name
    try:
        scale.run(args)
        if args.publish:
            publish(args.out)
    except UserError as e:
        raise SystemExit(f'error: {e}') from None


def publish(folder: Path) -> None:
    """Copies the plot to docs/ and writes the tables into docs/results.md."""
    shutil.copy(folder / 'scaling.png', ROOT / 'docs' / 'scaling.png')
    findings = report.Report(Results.load(folder / 'results.json'))
    picture = '![Growth with image size](scaling.png)'
    replace_section(ROOT / 'docs' / 'results.md', 'scaling', f'{picture}\n\n{report.digest(findings)}')


if __name__ == '__main__':
    main()
