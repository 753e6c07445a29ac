"""One run at a time in a run folder: a lock that the run's main process holds, and that a dead one leaves to nobody.

The lock is the kernel's (flock), so it goes with the process. A file system whose locks do not reach other hosts, or
that has none, is asked for the heartbeat of the run whose name stands in the lock file: one that still counts, runs.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from mellow_ds.errors import ConfigError, FaultError
from mellow_ds.monitor.heartbeat import ENDED, HEARTBEATS_NAME, read_beat
from mellow_ds.monitor.process_id import ProcessId

LOCK_NAME = "run.lock"
_SECONDS_TO_GO = 3.0  # that a run which is ending just now may take to let go
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """Holds a run folder from `take` to `release`, or to the end of the process."""

    def __init__(self, handle: int) -> None:
        """`handle`: the open lock file."""
        self._handle = handle

    @classmethod
    def take(cls, folder: Path) -> "RunLock":
        """Take the lock of `folder`, which exists; raises `ConfigError` naming the run that is in it already."""
        path = folder / LOCK_NAME
        try:
            # not handed on to processes that are started: they would hold the lock on
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FaultError(f"{path} cannot be opened for writing ({error.strerror})") from None
        is_locked = _lock(handle)
        holder = _read(handle)
        if is_locked is False or (holder is not None and _is_beating(folder, holder, is_locked)):
            os.close(handle)
            raise ConfigError(_refusal(folder, holder))
        content = {"process": vars(ProcessId.own()), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(content).encode(), 0)
        except OSError as error:
            os.close(handle)
            raise FaultError(f"{path} cannot be written ({error.strerror})") from None
        return cls(handle)

    def release(self) -> None:
        """Let the next run in. The file stays: removing it would let two runs lock two files of one name."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)


def _lock(handle: int) -> bool | None:
    """True: it is ours now; False: another process has it; None: this file system has no locks."""
    deadline = time.monotonic() + _SECONDS_TO_GO
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return None
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        else:
            return True


def _read(handle: int) -> dict[str, Any] | None:
    """What the last run wrote; None where it ended in order, or none was here."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
        return {"process": ProcessId(**content["process"]), "started": str(content["started"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_beating(folder: Path, holder: dict[str, Any], is_locked: bool | None) -> bool:
    """Whether the run that wrote the lock file is alive, where the lock itself does not tell."""
    state = holder["process"].state()
    if state in ("runs", "stopped"):
        # with the lock in our hands it can only be a process that has left the run, but not ended yet
        return is_locked is None
    if state == "gone":
        return False
    # a process of another host, out of sight
    first = read_beat(folder / HEARTBEATS_NAME, 0)
    if first is None or first.phase == ENDED:
        return False
    deadline = time.monotonic() + 2.5 * first.interval_seconds
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = read_beat(folder / HEARTBEATS_NAME, 0)
        if now is not None and now.beats != first.beats:
            return True
    return False


def _refusal(folder: Path, holder: dict[str, Any] | None) -> str:
    who = f"a run on {holder['process']}, started {holder['started']}" if holder else "another run"
    return f"{folder} is in use by {who}: wait for it or end it, or choose another save_dir"
