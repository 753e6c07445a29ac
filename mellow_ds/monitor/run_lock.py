"""One run at a time in a run folder: a lock that the run's main process holds, and that a dead one leaves to nobody.

The lock is the kernel's (flock), so it goes with the process. A file system whose locks do not reach other hosts, or
that has none, is asked for the heartbeat of the run whose name stands in the lock file: one that still counts, runs.
A file server keeps the lock of a host that is lost until its lease runs out (NFSv4: 90 s), or for ever (NFSv3).
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from mellow_ds.errors import ConfigError, FaultError
from mellow_ds.monitor.heartbeat import ENDED, HEARTBEATS_NAME, read_beat
from mellow_ds.monitor.process_id import ProcessId

LOCK_NAME = "run.lock"
_SECONDS_TO_GO = 3.0  # that a run which is ending just now may take to let go
_LEASE_SECONDS = 120.0  # that a file server may hold the lock of a host that is not heard any more
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_log = logging.getLogger("mellow_ds.monitor")


class RunLock:
    """Holds a run folder from `take` to `release`, or to the end of the process."""

    def __init__(self, handle: int) -> None:
        """`handle`: the open lock file."""
        self._handle = handle

    @classmethod
    def take(cls, folder: Path, launch_id: str = "") -> "RunLock":
        """Take the lock of `folder`, which exists; raises `ConfigError` naming the run that is in it already.

        `launch_id`: of `mellow-ds launch`, which starts an attempt only when all ranks of the one before have ended:
        their lock, where a server still keeps it for a lost host, is no obstacle.
        """
        path = folder / LOCK_NAME
        handle, is_locked = _open(path, launch_id)
        holder = _read(handle)
        is_own = _is_of_launch(holder, launch_id)
        if is_locked is False and is_own:
            os.close(handle)
            handle = _replaced(path, launch_id)
        elif is_locked is False or (holder is not None and not is_own and _is_beating(folder, holder, is_locked)):
            os.close(handle)
            raise ConfigError(_refusal(folder, holder))
        content = {
            "process": vars(ProcessId.own()), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "launch": launch_id,
        }  # fmt: skip
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


def _open(path: Path, launch_id: str) -> tuple[int, bool | None]:
    """(the open lock file, what `_lock` says of it)."""
    while True:
        try:
            # not handed on to processes that are started: they would hold the lock on
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            is_locked = _lock(handle, path.parent, launch_id)
            if not is_locked or _is_at(handle, path):
                return handle, is_locked
            os.close(handle)
        except OSError as error:
            raise FaultError(f"{path} cannot be opened for writing ({error.strerror})") from None


def _is_at(handle: int, path: Path) -> bool:
    """Whether the file is the one of that name still, and was not replaced while its lock was waited for."""
    own, there = os.fstat(handle), path.stat()
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _replaced(path: Path, launch_id: str) -> int:
    """A new file in the place of one whose lock nobody can give back; open and locked."""
    new = path.with_name(f"{path.name}.{launch_id}")
    try:
        handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.replace(path)
    except OSError as error:
        raise FaultError(f"{path} cannot be replaced ({error.strerror})") from None
    return handle


def _is_of_launch(holder: dict[str, Any] | None, launch_id: str) -> bool:
    """Whether the holder was an earlier attempt of our own start, on a host where it cannot be looked at."""
    return bool(launch_id) and holder is not None and holder["launch"] == launch_id and _is_far(holder)


def _is_far(holder: dict[str, Any]) -> bool:
    return bool(holder["process"].state() == "unknown")


def _lock(handle: int, folder: Path, launch_id: str) -> bool | None:
    """True: it is ours now; False: another process has it; None: this file system has no locks."""
    deadline = time.monotonic() + _SECONDS_TO_GO
    is_patient = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return None
            if time.monotonic() > deadline:
                holder = _read(handle)
                if is_patient or not holder or not _is_far(holder) or _is_of_launch(holder, launch_id):
                    return False
                if _is_beating(folder, holder, None):
                    return False
                _log.warning("the lock of %s, which is not heard, is waited for", holder["process"])
                is_patient, deadline = True, time.monotonic() + _LEASE_SECONDS
            time.sleep(0.1)
        else:
            return True


def _read(handle: int) -> dict[str, Any] | None:
    """What the last run wrote; None where it ended in order, or none was here."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
        process = ProcessId(**content["process"])
        return {"process": process, "started": str(content["started"]), "launch": str(content.get("launch", ""))}
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
    lost = f" (where its host is lost for good, remove {folder / LOCK_NAME})" if holder and _is_far(holder) else ""
    return f"{folder} is in use by {who}: wait for it or end it, or choose another save_dir{lost}"
