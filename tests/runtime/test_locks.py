"""One run at a time writes into a folder."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ls_vision.runtime.errors import UserError
from ls_vision.runtime.locks import hold_folder

HOLDER = """
import os, sys, time
sys.argv[0] = 'ls-vision'  # imports no torch
from pathlib import Path
from ls_vision.runtime.locks import hold_folder

with hold_folder(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_second_run_is_refused_until_the_first_one_ends(tmp_path):
    message = 'is being written by another run'
    with hold_folder(tmp_path), pytest.raises(UserError, match=message), hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):
        assert not list(tmp_path.iterdir())


def test_killed_run_holds_nothing_though_its_loaders_live(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    process = subprocess.Popen(
        [sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError), hold_folder(tmp_path):
            pass
        time.sleep(.1)  # the child lets go when it starts
        process.kill()
        process.wait()
        with hold_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
