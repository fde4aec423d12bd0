"""Runs timm's own tests/test_models.py, unmodified, on the models of this package.

    python tests/timm_suite.py                         every registered name
    python tests/timm_suite.py vil_ls_tiny cvt_ls_13   those that match one of these patterns

The file comes from the source distribution of the timm release that is installed, into build/.
"""
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

ROOT = Path(__file__).resolve().parents[1]


def fetch_tests() -> Path:
    """The tests folder of timm's source distribution, fetched once per release."""
    target = ROOT / 'build' / f'timm-{timm.__version__}-tests'
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
            subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary',
                 'timm', '--dest', tmp, f'timm=={timm.__version__}'], check=True)
            archive = next(Path(tmp).glob('timm-*.tar.gz'))
            with tarfile.open(archive) as tar:
                tar.extractall(tmp, members=[m for m in tar if '/tests/' in m.name], filter='data')
            next(Path(tmp).glob('timm-*/tests')).rename(target)
    return target


def main() -> int:
    env = dict(os.environ, LS_VISION_MODELS=','.join(sys.argv[1:]) or '*')
    env['PYTHONPATH'] = os.pathsep.join([str(ROOT / 'tests'), env.get('PYTHONPATH', '')])
    tests = fetch_tests()
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'timm_plugin', '-q', '-p', 'no:cacheprovider', '-o', 'timeout=0',
         '-o', 'addopts=', '--rootdir', str(tests), '-W', 'ignore', '--durations=5', str(tests / 'test_models.py')],
        env=env, cwd=tests).returncode


if __name__ == '__main__':
    sys.exit(main())
