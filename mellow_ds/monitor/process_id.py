"""Who a process is, so that another one can tell whether it is still there, stopped, or gone, and end it.

A process number alone says little: it is used again, and another container of the same host counts its own.
"""

import hashlib
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["runs", "stopped", "gone", "unknown"]
_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process of some host."""

    host: str  # its name, for messages
    pid: int
    place: str = ""  # kernel and process-number space that `pid` counts in; empty where it cannot be known
    started: int = 0  # clock ticks from the host's start to the process's

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _place(), _stat(pid)[1])

    def state(self) -> State:
        """What it does now; `unknown` for one of another host or container."""
        if not self.place or self.place != _place():
            return "unknown"
        letter, started = _stat(self.pid)
        if started != self.started or letter in ("Z", "X", ""):
            return "gone"
        return "stopped" if letter in ("T", "t") else "runs"

    def kill(self) -> bool:
        """SIGKILL to this very process, never to a later one of its number; False where it cannot be reached."""
        if not hasattr(os, "pidfd_open"):
            return False
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # looked at after the handle is open: from here on the number cannot pass to another process
            if self.state() not in ("runs", "stopped"):
                return False
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(handle)
        return True

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def descendants(pid: int) -> list[ProcessId]:
    """The processes that this one of our host has started, and theirs (Linux)."""
    place, host = _place(), socket.gethostname()
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        fields = _stat_fields(int(folder.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, left = [], [pid]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return [ProcessId(host, child, place, _stat(child)[1]) for child in found]


def ancestors(pid: int) -> list[ProcessId]:
    """The process that has started this one of our host, the one that has started that, and so on (Linux)."""
    place, host = _place(), socket.gethostname()
    found: list[ProcessId] = []
    fields = _stat_fields(pid)
    while fields and int(fields[1]) > 0:
        parent = int(fields[1])
        found.append(ProcessId(host, parent, place, _stat(parent)[1]))
        fields = _stat_fields(parent)
    return found


def host_number() -> int:
    """62 bits that are the same for processes which see one another and share a network, and differ elsewhere."""
    try:
        network = str((_PROC / "self/ns/net").readlink())
    except OSError:
        network = socket.gethostname()
    return int.from_bytes(hashlib.sha256(f"{_place()} {network}".encode()).digest()[:8], "big") >> 2


def _place() -> str:
    if sys.platform != "linux":
        return ""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int]:
    """(state letter, start in clock ticks), fields 3 and 22 of proc(5); ("", 0): there is no such process."""
    fields = _stat_fields(pid)
    return (fields[0], int(fields[19])) if fields else ("", 0)


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its field 3 on; empty where there is no such process."""
    try:
        # the name, field 2, stands in brackets and may hold blanks and brackets itself
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
