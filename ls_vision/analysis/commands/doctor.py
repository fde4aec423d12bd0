"""Checks long-short attention on this machine: versions, devices, and every backend against float64.

    ls-vision doctor
    ls-vision doctor --out report
    ls-vision doctor --bench                           # on a GPU: how fast and lean, minutes

The checks run in a process of their own, so that a kernel which breaks the GPU's state harms nobody. --out writes
report.txt and report.json to attach to a bug report. --bench measures models, attention and memory beside timm's and
writes a dated file. The exit code is 1 where a check failed.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--out', metavar='NAME', help='write NAME.txt and NAME.json')
    parser.add_argument(
        '--bench', metavar='FOLDER', nargs='?', const='benchmarks/results', help='measure, too (default: %(const)s)')


def run(args: argparse.Namespace) -> None:
    from ls_vision.runtime.errors import UserError

    out = Path(args.out) if args.out else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f'--out {args.out}: there is no folder {out.parent}')
    if args.bench and not Path(args.bench).is_dir():
        raise UserError(f'--bench {args.bench}: there is no such folder')
    report = examine()
    text = describe(report)
    print(text)
    if out is not None:
        out.with_name(out.name + '.txt').write_text(text + '\n')
        out.with_name(out.name + '.json').write_text(json.dumps(report, indent=1) + '\n')
    if any(check['outcome'] == 'failed' for check in report['checks']):
        sys.exit(1)
    if args.bench:
        measure(args.bench, has_gpu=bool(report['facts'].get('GPUs')))


def measure(folder: str, has_gpu: bool) -> None:
    """Writes the tables of speed and memory, by another process."""
    if not has_gpu:
        print('skipped: the measurements of --bench: there is no GPU')
        return
    code = subprocess.run([sys.executable, '-m', 'ls_vision.analysis.gpu_speed', folder]).returncode
    if code != 0:
        sys.exit(code)


def examine() -> dict[str, Any]:
    """Runs the checks in another process.

    Returns:
        `facts` by name, and `checks`, each with its name, `outcome` ok, failed or skipped, and a `detail`.
    """
    from tqdm import tqdm

    report: dict[str, Any] = {'facts': {}, 'checks': []}
    begun: Optional[str] = 'start'
    command = [sys.executable, '-m', 'ls_vision.analysis.doctor']
    with tempfile.TemporaryFile('w+') as log, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        for line in tqdm(process.stdout, desc='checking', unit='line', leave=False, disable=None):
            message = json.loads(line)
            report['facts'].update(message.get('facts', {}))
            begun = message.get('begins') if 'check' not in message else None
            if 'check' in message:
                report['checks'].append(message)
        process.wait()
        log.seek(0)
        errors = log.read().strip().splitlines()
    if process.returncode != 0:
        last = errors[-1] if errors else 'no message'
        report['checks'].append(dict(
            check=begun or 'end', outcome='failed', detail=f'ended the process with code {process.returncode}: {last}'))
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as text: facts, what failed or was skipped and why, and what passed in short."""
    checks = report['checks']
    lines = [f'{name}: {value}' for name, value in report['facts'].items()]
    by_outcome = {outcome: [c for c in checks if c['outcome'] == outcome] for outcome in ('failed', 'skipped', 'ok')}
    lines += ['', ', '.join(f'{len(found)} {outcome}' for outcome, found in by_outcome.items())]
    for outcome, found in by_outcome.items():
        lines += [f'{outcome}: {check["check"]}: {check["detail"]}' for check in found]
    return '\n'.join(lines)
