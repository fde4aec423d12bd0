"""A signal asks a run to stop; a second Ctrl-C stops it at once."""
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from ls_vision.runtime.signals import StopRequest


def test_stop_request():
    with StopRequest() as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_closed_terminal_stops_a_run_unless_nohup_started_it():
    for before, expected in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        original = signal.signal(signal.SIGHUP, before)
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.signal_number == expected
            assert signal.getsignal(signal.SIGHUP) == before
        finally:
            signal.signal(signal.SIGHUP, original)


def test_thread_that_trains():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: StopRequest().__enter__().__exit__(None, None, None)).result() is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
