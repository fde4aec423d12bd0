"""A signal asks a run to stop; a second Ctrl-C stops it at once."""
import os
import signal

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
