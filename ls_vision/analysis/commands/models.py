"""Lists the models with parameters, multiply-adds and published accuracy.

    ls-vision models
    ls-vision models --format csv > models.csv
"""
import argparse
from typing import Any

from ls_vision.analysis.tables import FORMATS, giga, render

COLUMNS = {
    'model': lambda row: row['model'],
    'img size': lambda row: row['img_size'],
    'parameters, M': lambda row: f'{row["params"] / 1e6:.2f}',
    'GMAC': lambda row: giga(row['macs']),
    'top-1, %': lambda row: row['top1'],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--format', choices=FORMATS, default='markdown', help='output format (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    print(render(args.format, rows(), COLUMNS))


def rows() -> list[dict[str, Any]]:
    """Every model of this package at its configured size; accuracy is None where none has been published."""
    from tqdm import tqdm

    from ls_vision.analysis.flops import count
    from ls_vision.analysis.zoo import PUBLISHED, default_size, own_models, size_name

    out = []
    for name in tqdm(own_models(), desc='counting', unit='model', leave=False, disable=None):
        size = default_size(name)
        result = count(name, size)
        published = PUBLISHED.get(name)
        out.append(dict(
            model=name, img_size=size_name(size), params=result.params, macs=result.macs,
            top1=published and published.top1, source=published and published.source))
    return out
