"""Ctrl-C and SIGTERM as a request to stop after the present step; a second one stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self, final

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupt:
    """Inside this context `requested` turns True on the first signal. Outside the main thread signals are left alone."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
