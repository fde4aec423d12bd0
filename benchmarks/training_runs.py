"""What the benchmarks that train share: arguments, runs that go on when interrupted, the table."""
import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ls_vision.analysis.measure import describe_machine, write
from ls_vision.runtime.arguments import positive_int
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import write_text

RESULTS = Path(__file__).parent / 'results'
CHECKPOINT_STEPS = 100


def add_arguments(
        parser: argparse.ArgumentParser,
        variants: Iterable[str],
        runs: str,
        steps: int | None = None,
) -> None:
    """Which runs, of how many updates (unless None), where they are kept, and how many threads they take."""
    parser.add_argument('--variants', nargs='+', choices=variants, default=list(variants))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    if steps is not None:
        parser.add_argument('--steps', type=positive_int, default=steps)
    parser.add_argument('--runs', type=Path, default=Path(runs))
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--threads', type=positive_int, default=torch.get_num_threads())
    parser.add_argument('--report', action='store_true', help='no training, only the table of finished runs')


def run_all(
        args: argparse.Namespace,
        path_of: Callable[[Any, int], Path],
        run: Callable[[Any, int], dict[str, Any]],
        variants: Iterable[Any] | None = None,
) -> list[dict[str, Any]]:
    """Results of all variants and seeds: finished ones are read, the others run, or left out for `--report`.

    Args:
        args: With those of `add_arguments`.
        path_of: (variant, seed) -> path of a run without suffix.
        run: (variant, seed) -> its results.
        variants: What to run for each seed, in order; `args.variants` by default.
    """
    torch.set_num_threads(args.threads)
    rows = []
    variants = args.variants if variants is None else list(variants)
    for seed in args.seeds:
        for variant in variants:
            done = path_of(variant, seed).with_suffix('.json')
            if done.exists():
                rows.append(json.loads(done.read_text()))
            elif not args.report:
                rows.append(run(variant, seed))
    return rows


def publish(args: argparse.Namespace, name: str, rows: list[dict[str, Any]], text: str) -> None:
    """Writes rows and table to dated files, and prints the table."""
    path = args.out / dated(name)
    write(path, describe_machine('cpu', 'float32', args.threads), rows, text)
    print(path.with_suffix('.md').read_text())


def dated(name: str) -> str:
    """The name of today's files of results, without suffix."""
    return f'{name}_{datetime.date.today():%Y-%m-%d}'


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several values, standard deviation."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.{digits}f}'


def interval(values: list[float], digits: int = 2) -> str:
    """Mean and 95 % confidence interval by Student's t; a dash of fewer than two values."""
    try:
        from scipy.stats import t
    except ImportError as e:
        raise UserError('the confidence intervals need scipy: pip install scipy') from e
    if len(values) < 2:
        return '—'
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** .5
    half = float(t.ppf(.975, len(values) - 1)) * error
    return f'{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})'


def train(
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        loss_of: Callable[[int], Tensor],
        evaluate: Callable[[], dict[str, Any]],
        steps: int,
) -> dict[str, Any]:
    """Trains a model and writes its results to `run`.json; an interrupted run is continued.

    Args:
        run: Path without suffix.
        model, optimizer, scheduler: What is trained, and how; the scheduler steps after each update.
        loss_of: The loss of a step by its number, which alone decides its data.
        evaluate: Results of the trained model.
        steps: Number of updates.

    Returns:
        The results, with `seconds` of training and `losses`, means of every `CHECKPOINT_STEPS` updates.
    """
    checkpoint = run.with_suffix('.pt')
    run.parent.mkdir(parents=True, exist_ok=True)
    first, seconds, losses = 0, 0., []
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept['model'])
        optimizer.load_state_dict(kept['optimizer'])
        scheduler.load_state_dict(kept['scheduler'])
        first, seconds, losses = kept['step'], kept['seconds'], kept['losses']
    model.train()
    start, recent = time.perf_counter(), []
    for step in tqdm(range(first, steps), desc=run.name, initial=first, total=steps, disable=None):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        recent.append(loss.item())
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            losses, recent = [*losses, sum(recent) / len(recent)], []
            now = time.perf_counter()
            seconds, start = seconds + now - start, now
            part = checkpoint.with_suffix('.part')
            torch.save(dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
                step=step + 1, seconds=seconds, losses=losses), part)
            os.replace(part, checkpoint)
    model.eval()
    results = dict(evaluate(), steps=steps, seconds=seconds, losses=losses)
    write_text(run.with_suffix('.json'), json.dumps(results, indent=1) + '\n')
    return results
