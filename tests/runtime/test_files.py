"""A file is replaced as a whole or not at all."""
import signal
import subprocess
import sys

import pytest

from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import atomic_write, write_text

KILLED_WRITER = '''
import os, signal, sys
from ls_vision.runtime.files import atomic_write

with atomic_write(sys.argv[1]) as file:
    file.write(b'x' * 1_000_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
'''


def test_kill_during_a_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / 'file'
    write_text(path, 'before')
    killed = subprocess.run([sys.executable, '-c', KILLED_WRITER, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == 'before'

    # The file that the kill has left does not disturb the next write.
    write_text(path, 'after')
    assert path.read_text() == 'after' and list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_nothing_behind(tmp_path):
    def write():
        with atomic_write(tmp_path / 'file'):
            raise OSError('disk full')

    with pytest.raises(UserError, match='file cannot be written: disk full; its previous content is unchanged'):
        write()
    assert not list(tmp_path.iterdir())


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match='nowhere/file cannot be written: No such file or directory'):
        write_text(tmp_path / 'nowhere' / 'file', '')


def test_replaced_file_is_kept_under_another_name(tmp_path):
    for text in ('first', 'second', 'third'):
        with atomic_write(tmp_path / 'last', keep=tmp_path / 'previous') as file:
            file.write(text.encode())
    assert (tmp_path / 'last').read_text() == 'third' and (tmp_path / 'previous').read_text() == 'second'


def test_writers_that_need_a_path(tmp_path):
    with atomic_write(tmp_path / 'file') as file, open(file.name, 'w') as other:
        other.write('by path')
    assert (tmp_path / 'file').read_text() == 'by path'
