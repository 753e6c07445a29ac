"""Asking a run to stop: signals set a flag, the trainer reads it after a step, all ranks agree, the state is saved."""

import ctypes
import os
import signal
import sys
from types import FrameType

from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """The exit code that a signal asked for; 0 while none has. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.exit_code = 0

    def listen(self) -> None:
        """Take over SIGTERM, SIGUSR1 (85: start again to go on) and SIGINT (130)."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its launcher dies: a rank never outlives it (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
