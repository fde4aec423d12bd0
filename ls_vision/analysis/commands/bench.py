"""Measures latency, throughput and peak memory of any timm model on this machine.

    ls-vision bench vil_ls_medium
    ls-vision bench vil_ls_medium swin_small_patch4_window7_224 --img-size 224 448 --batch-size 1 8
    ls-vision bench vil_ls_small --mode training --device cuda --dtype bfloat16 --format json

Every measurement runs in a fresh process. Each result is also written to a file at once.
"""
import argparse
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ls_vision.analysis.tables import FORMATS, render
from ls_vision.runtime.arguments import image_size, positive_int, positive_number

if TYPE_CHECKING:
    from ls_vision.analysis.worker import Settings

MODES = ('inference', 'training')  # as in `ls_vision.analysis.worker`, which imports torch

COLUMNS = {
    'model': lambda row: row['model'],
    'img size': lambda row: _size_name(row['img_size']),
    'batch': lambda row: row['batch_size'],
    'mode': lambda row: row['mode'],
    'GMAC': lambda row: f'{row["macs"] / 1e9:.2f}',
    'ms': lambda row: f'{row["latency"] * 1e3:.1f}' if row['status'] == 'ok' else row['status'],
    'quartiles': lambda row: ' to '.join(f'{s * 1e3:.1f}' for s in row.get('latency_quartiles', ())),
    'images/s': lambda row: f'{row["throughput"]:.2f}' if row['status'] == 'ok' else '',
    'peak memory, MiB': lambda row: f'{row["memory"] / 2 ** 20:.0f}' if row['status'] == 'ok' else '',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', nargs='+', metavar='MODEL', help='name of a model of this package or of timm')
    parser.add_argument('--img-size', type=image_size, nargs='+', metavar='SIZE', help="default: the model's own size")
    parser.add_argument('--format', choices=FORMATS, default='markdown', help='output format (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='file of results (default: output/bench/TIME.json)')
    add_measuring_arguments(parser, seconds=10., rounds=1)


def add_measuring_arguments(parser: argparse.ArgumentParser, seconds: float, rounds: int) -> None:
    """Adds the arguments of a measurement."""
    parser.add_argument('--batch-size', type=positive_int, nargs='+', default=[1], metavar='N', help='default: 1')
    parser.add_argument('--mode', choices=MODES, nargs='+', default=list(MODES), help='default: both')
    add_device_arguments(parser)
    parser.add_argument(
        '--seconds', type=positive_number, default=seconds,
        help='time per measurement after a warm-up call; longer calls are made once (default: %(default)s)')
    parser.add_argument(
        '--rounds', type=positive_int, default=rounds, help='rounds over all models (default: %(default)s)')
    parser.add_argument(
        '--memory-limit', type=positive_number, metavar='GIB',
        help='memory limit of a process on the CPU (default: nine tenths of the free memory)')


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say on what a measurement runs."""
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='default: %(default)s')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument(
        '--threads', type=positive_int, metavar='N', help='CPU threads (default: as many as PyTorch takes by itself)')


def run(args: argparse.Namespace) -> None:
    from ls_vision.analysis import scale
    from ls_vision.analysis.zoo import check_model, default_size

    now = f'{datetime.datetime.now():%Y-%m-%d_%H%M%S}'
    results = scale.Results.create(args.out or Path(f'output/bench/{now}.json'), settings(args), resume=False)
    for name in args.models:
        check_model(name)
    points = [
        point for name in args.models
        for point in scale.plan([name], args.img_size or [default_size(name)], args.batch_size, args.mode)]
    try:
        scale.measure_points(points, results, args.rounds)
    finally:
        if results.rows:
            print(render(args.format, results.rows, COLUMNS), flush=True)


def settings(args: argparse.Namespace) -> 'Settings':
    """Raises UserError where the device cannot be used."""
    import torch

    from ls_vision.analysis.worker import Settings, available_memory
    from ls_vision.runtime.devices import check_device

    check_device(args.device)
    limit = available_memory() if args.memory_limit is None else args.memory_limit * 2 ** 30 / 0.9
    return Settings(
        device=args.device, dtype=args.dtype, threads=args.threads or torch.get_num_threads(), seconds=args.seconds,
        memory_limit=int(0.9 * (limit or 2 ** 62)))


def _size_name(size: Any) -> str:
    from ls_vision.analysis.zoo import size_name

    return size_name(tuple(size))
