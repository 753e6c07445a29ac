"""The signals that ask the launcher to stop, noted while it watches and waits, from its first host to its last."""

import contextlib
import os
import selectors
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED


class StopSignals:
    """A context manager; outside of the main thread, which gets no signals, nothing is ever asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # numbers of the signals, first one first
        self._before: dict[int, Any] = {}
        self._woken, self._wakes = os.pipe()

    def __enter__(self) -> "StopSignals":
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
            # Ctrl-Z would silence this process, and the hosts would take it for dead
            self._before = {signal.SIGTSTP: signal.signal(signal.SIGTSTP, signal.SIG_IGN)}
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # ignored: by nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for descriptor in (self._woken, self._wakes):
            os.close(descriptor)

    @property
    def exit_code(self) -> int:
        """Of a launcher that was asked to stop and had no rank to ask."""
        return EXIT_INTERRUPTED if self.asked[0] == signal.SIGINT else EXIT_STOPPED

    def fileno(self) -> int:
        """What a selector can wait for."""
        return self._woken

    def clear(self) -> None:
        """Take what woke the selector."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def wait(self, seconds: float) -> bool:
        """Sleep; True at once where a signal has asked, or asks meanwhile."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            # any signal that Python handles wakes, that of a child which has ended too
            while not self.asked and (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    self.clear()
        return bool(self.asked)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
