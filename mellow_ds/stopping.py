"""Asking a run to stop: a signal or the clock says so, the trainer asks after a step, all ranks agree and save."""

import atexit
import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED

_ONE_REQUEST_SECONDS = 1.0  # a launcher and its shell may both pass a stop on


class StopRequest:
    """The exit code that a signal asked for; 0 while none has. A second signal ends the process at once.

    Python runs a handler only between two of its own instructions, and a rank that waits for another inside a
    collective reaches none: a thread hears the second signal there, unless it comes with the first.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.started = time.monotonic()  # when the run began, for `train.max_hours`
        self.is_out_of_time = False  # set where that is over; a signal after it is still the first
        self._is_saved = False
        self._numbers: set[int] = set()  # of the signals that are taken over

    def listen(self, interrupt: bool = True) -> None:
        """Take over SIGTERM, SIGUSR1 (85: start again to go on) and, with `interrupt`, SIGINT (130)."""
        if not self._numbers:
            self._start_thread()
            atexit.register(turn_deaf)
        self._numbers |= {signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if interrupt else [])}
        for number in self._numbers:
            signal.signal(number, self._receive)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this, where the state is saved already, a signal (or one before it) ends the process with its code."""
        self._is_saved = True
        try:
            if self.exit_code:
                raise SystemExit(self.exit_code)
            yield
        finally:
            self._is_saved = False

    def _start_thread(self) -> None:
        reads, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of a loader process are its own
        threading.Thread(target=self._hear_second, args=(reads,), name="signals", daemon=True).start()

    def _hear_second(self, reads: int) -> None:
        first = 0.0
        while True:
            for number in os.read(reads, 64):
                if number in self._numbers:
                    now = time.monotonic()
                    if first and now - first > _ONE_REQUEST_SECONDS:
                        _end_by(number)
                    first = first or now

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code:
            _end_by(number)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED
        if self._is_saved:
            raise SystemExit(self.exit_code)


def _end_by(number: int) -> None:
    """End this process as the signal does where nobody listens; from any thread, which `signal.signal` is not for."""
    ctypes.CDLL(None).signal(number, None)
    os.kill(os.getpid(), number)


def turn_deaf() -> None:
    """Python takes its handlers back before it is gone: a signal then would make a finished run look failed."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TimeBudget:
    """The wall clock of a run (`train.max_hours`): whether another step and the save after it still fit.

    Steps and saves are taken to be as long as the longest so far, with a margin: a step includes what comes between
    two steps, such as measuring.
    """

    _MARGIN = 1.25
    _FIRST_SAVE = 0.1  # of the budget, before a save has been measured ...
    _FIRST_SAVE_SECONDS = 60.0  # ... but no more

    def __init__(self, max_hours: float, started: float) -> None:
        """`max_hours` 0: no limit. `started`: by the monotonic clock, which no change of the date moves."""
        self._seconds = max_hours * 3600
        self._started = started
        self._last_step: float | None = None
        self._longest_step = 0.0
        self._longest_save = min(self._FIRST_SAVE * self._seconds, self._FIRST_SAVE_SECONDS)
        self._has_saved = False

    def begin_steps(self) -> None:
        """What comes before the next `note_step` is no step: building what a phase trains."""
        self._last_step = None

    def note_step(self) -> None:
        """A step ends now (or, called first, the first one begins)."""
        now = time.monotonic()
        if self._last_step is not None:
            self._longest_step = max(self._longest_step, now - self._last_step)
        self._last_step = now

    def note_save(self, seconds: float) -> None:
        """A save took this long."""
        self._longest_save = max(self._longest_save, seconds) if self._has_saved else seconds
        self._has_saved = True

    @property
    def is_spent(self) -> bool:
        """Whether it is time to save and leave. A run makes at least one step, so that being started again helps."""
        if not self._seconds or not self._longest_step:
            return False
        left = self._seconds - (time.monotonic() - self._started)
        return left < self._MARGIN * (self._longest_step + self._longest_save)
