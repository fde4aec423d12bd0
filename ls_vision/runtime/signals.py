"""SIGTERM, SIGHUP of a closed terminal, and Ctrl-C: a run finishes its step, saves and exits."""
import signal
import threading
from types import FrameType, TracebackType

SIGHUP = getattr(signal, 'SIGHUP', None)  # Windows has none


class StopRequest:
    """Remembers that a signal asked the run to stop; a second Ctrl-C stops it at once.

    Use it as a context manager and read `signal_number` between steps. By convention the exit code is 128 more. In a
    thread that is not the main one Python allows no handlers, and signals do what they did before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, *([SIGHUP] if SIGHUP is not None else []))

    def __init__(self) -> None:
        self.signal_number = 0  # no signal so far

    def __enter__(self) -> 'StopRequest':
        self._previous = {
            number: signal.signal(number, self._handle) for number in self.SIGNALS if _is_main_thread()
            and (number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN)}  # nohup
        return self

    def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def ignore_stop_signals(worker: int) -> None:
    """Let a loader process survive a signal that is sent to the whole process group, so that the step can finish.

    Args:
        worker: Its number, as `DataLoader` passes it to a `worker_init_fn`.
    """
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
