"""Output that nobody reads, or that the locale cannot show, does not end a run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from ls_vision.runtime.logs import ProgressBar, say
from ls_vision.runtime.streams import prepare_streams

prepare_streams()
say('class \u732b')
with ProgressBar('epoch', 3, log_interval=1) as bar:
    bar.bar.disable = False
    for _ in range(3):
        bar.update(loss=1.)
say('still here')
open(sys.argv[1], 'w').write('done')
"""


def run(tmp_path, **kwargs):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **kwargs.pop('env', {}))
    code = 'import sys; sys.argv[0] = "ls-vision"'  # imports no torch
    result = subprocess.run(
        [sys.executable, '-c', code + PROGRAM, str(tmp_path / 'done')], env=environment, timeout=60, **kwargs)
    assert result.returncode == 0 and (tmp_path / 'done').read_text() == 'done'
    return result


def test_reader_that_is_gone(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run(tmp_path, stdout=writer, stderr=writer)
    os.close(writer)


def test_terminal_that_is_closed(tmp_path):
    master, terminal = os.openpty()
    os.close(master)
    run(tmp_path, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)


def test_disk_that_is_full(tmp_path):
    with open('/dev/full', 'w') as full:
        run(tmp_path, stdout=full, stderr=full)


def test_no_streams_at_all(tmp_path):
    run(tmp_path, preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'iso8859-9'])
def test_encoding_without_the_character(tmp_path, encoding):
    result = run(tmp_path, capture_output=True, env=dict(PYTHONIOENCODING=encoding))
    assert b'class \\u732b' in result.stdout
