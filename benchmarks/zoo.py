#!/usr/bin/env python3
"""The model zoo table: parameters, multiply-adds, published accuracy and measured speed of every model.

    python benchmarks/zoo.py              # float32 on CPU, each model at its native image size
    python benchmarks/zoo.py --resume
    python benchmarks/zoo.py --device cuda --dtype bfloat16 --batch-size 64
    python benchmarks/zoo.py --publish    # writes the table into README.md, between its markers

Writes benchmarks/results/zoo_DEVICE_DTYPE_DATE.json after every model.
"""
import argparse
import datetime
from pathlib import Path
from typing import Any

from pages import replace_section

from ls_vision.analysis import scale
from ls_vision.analysis.commands.bench import add_measuring_arguments, settings
from ls_vision.analysis.tables import markdown
from ls_vision.analysis.worker import Point
from ls_vision.analysis.zoo import PUBLISHED, default_size, own_models, size_name
from ls_vision.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / 'results'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser, seconds=4., rounds=2)
    parser.add_argument('--resume', action='store_true', help='continue a run started today')
    parser.add_argument('--publish', action='store_true', help='write the table into README.md')
    parser.add_argument('--models', nargs='+', default=own_models(), help='default: all')
    parser.add_argument('--out', type=Path, help='file of results')
    parser.set_defaults(mode=['inference'])
    args = parser.parse_args()
    name = f'zoo_{args.device}_{args.dtype}_{datetime.date.today()}.json'
    try:
        results = scale.Results.create(args.out or RESULTS / name, settings(args), args.resume)
        points = [Point(name, default_size(name), args.batch_size[0], 'inference') for name in args.models]
        scale.measure_points(points, results, args.rounds)
    except UserError as e:
        raise SystemExit(f'error: {e}') from None
    text = table(results)
    print(text)
    if args.publish:
        replace_section(ROOT / 'README.md', 'zoo', text)


def table(results: scale.Results) -> str:
    """The models, and how speed was measured."""
    machine = results.machine
    batch = results.rows[0]['batch_size']
    speed = f'images/s, {"CPU" if results.settings.device == "cpu" else "GPU"}'
    columns = {
        'model': lambda row: f'`{row["model"]}`',
        'parameters': lambda row: f'{row["params"] / 1e6:.1f} M',
        'GMAC': lambda row: f'{row["macs"] / 1e9:.2f}',
        'px': lambda row: size_name(tuple(row['img_size'])),
        'top-1': lambda row: PUBLISHED[row['model']].top1 if row['model'] in PUBLISHED else '',
        speed: lambda row: f'{row["throughput"]:.1f}' if row['status'] == 'ok' else row['status'],
    }
    rows = sorted(results.rows, key=order)
    return (
        f'{markdown(rows, columns)}\n\n'
        f'Forward pass on {machine["device"]}, {machine["threads"]} threads, {machine["dtype"]}, batch {batch}; median '
        f'of {len(rows[0]["visits"])} rounds; torch {machine["torch"]}, {machine["date"]}; `{machine["command"]}`.')


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """ViL-LS, its linear variants, CvT-LS, full attention; each family by its cost."""
    name = row['model']
    vil, cvt = name.startswith('vil_ls'), name.startswith('cvt_ls')
    families = (vil and 'linear' not in name, vil, cvt)
    return (*(not member for member in families), row['macs'])


if __name__ == '__main__':
    main()
