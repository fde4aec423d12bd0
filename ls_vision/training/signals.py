"""SIGTERM and Ctrl-C: the run goes on to the end of the step, saves and exits."""
import signal
from types import FrameType, TracebackType


class StopRequest:
    """Remembers that a signal asked the run to stop; a second Ctrl-C stops it at once.

    Use as a context manager, and look at `signal_number` between steps. The exit code by custom is 128 more.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_number = 0  # 0: nobody asked

    def __enter__(self) -> 'StopRequest':
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
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
