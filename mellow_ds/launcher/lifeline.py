"""A rank ends when what started it on its host is gone, though nobody tells it.

DeepSpeed's and torchrun's launchers leave ranks behind: those of a `launch` or an agent that was killed live on, and so
does all that was started through an ssh connection that has closed, since ssh without a terminal sends no SIGHUP. This
watches the processes above the rank that stand for its start; when one is gone it asks the rank to save and stop, as
SIGTERM does, and ends it where it does not. Ranks of `mellow-ds launch` are ended by their agent; here it is only one
more reason. Linux only: elsewhere nothing is watched.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mellow_ds.errors import EXIT_FAULT
from mellow_ds.monitor.process_id import ProcessId, ancestors

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 15.0  # to save; with what notices the loss before it, all is over in 30 s
_LAUNCHERS = ("deepspeed.launcher.launch",)  # what is started by a process that may go before it
# of OpenSSH's server: `sshd: root@notty`, from 9.8 on `sshd-session: root@notty`; with a terminal it says `@pts/0`
_SESSION = re.compile(r"sshd(-session)?: \S+@notty")


def hold_on(is_stopping: Callable[[], object]) -> None:
    """From now on end this process when what started it is gone; `is_stopping`: whether a signal was heard already."""
    held = what_holds(os.getpid()) if sys.platform == "linux" else []
    if held:
        threading.Thread(target=_watch, args=(held, is_stopping), name="lifeline", daemon=True).start()


def what_holds(pid: int) -> list[tuple[str, ProcessId]]:
    """The processes without which this one has no reason to go on, each with how it is called in a message."""
    above = ancestors(pid)
    held = [("its launcher", process) for process in above[:1]]
    if len(above) > 1 and any(name in _command(above[0].pid) for name in _LAUNCHERS):
        held.append(("what started its launcher", above[1]))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # nohup: meant to outlive the connection, and the shell that it was typed into
        held = [(what, process) for what, process in held if _session_of(process.pid) != process.pid]
    else:
        held += [("the ssh connection", process) for process in above if _SESSION.match(_command(process.pid))][:1]
    return [(what, process) for what, process in held if process.pid != 1]


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _watch(held: Sequence[tuple[str, ProcessId]], is_stopping: Callable[[], object]) -> None:
    while True:
        time.sleep(_POLL_SECONDS)
        for what, process in held:
            if process.state() == "gone":
                _end(what, process, is_stopping)
                return


def _end(what: str, process: ProcessId, is_stopping: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):  # who read it may be gone as well
        print(
            f"mellow-ds: {what} (pid {process.pid}) is gone: this rank saves and stops, within {_GRACE_SECONDS:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if not is_stopping():  # a second signal would end it before it has saved
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(EXIT_FAULT)  # nothing says that its state is saved
