"""One run a folder: with the kernel's lock, and where the file system has none that counts."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.errors import ConfigError, FaultError
from mellow_ds.monitor import run_lock
from mellow_ds.monitor.heartbeat import ENDED, HEARTBEATS_NAME, RankHeartbeat, make_heartbeats, write_beat
from mellow_ds.monitor.process_id import ProcessId
from mellow_ds.monitor.run_lock import LOCK_NAME, RunLock
from mellow_ds.monitor.watchdog import open_heartbeat
from mellow_ds.world import World

HOLDER = """
import sys, time
from pathlib import Path
from mellow_ds.monitor.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_TO_GO", 0.2)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, as some parallel ones are mounted."""

    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def write_holder(folder: Path, process: ProcessId) -> None:
    (folder / LOCK_NAME).write_text(json.dumps({"process": vars(process), "started": "2026-01-02 03:04:05"}))


def test_a_folder_is_held_until_it_is_released(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    with pytest.raises(ConfigError, match=f"is in use by a run on {ProcessId.own()}, started 20"):
        RunLock.take(tmp_path)
    lock.release()
    RunLock.take(tmp_path).release()


def test_another_process_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ConfigError, match=f"pid {holder.pid}, started .*: wait for it or end it, or choose another"):
        RunLock.take(tmp_path)


def test_a_killed_process_leaves_the_folder_to_the_next(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    RunLock.take(tmp_path).release()


def test_a_process_that_was_started_meanwhile_does_not_hold_on(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        RunLock.take(tmp_path).release()
    finally:
        child.kill()
        child.wait()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_of_this_host_that_runs_is_found(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
        RunLock.take(tmp_path)
    holder.kill()
    holder.wait()
    RunLock.take(tmp_path).release()


def test_a_lock_that_does_not_reach_another_host_is_not_trusted(tmp_path: Path) -> None:
    """The lock is free on this host, but the run that another host wrote into it goes on beating."""
    make_heartbeats(tmp_path / HEARTBEATS_NAME)
    far = ProcessId("gpu003", 4711, "another kernel pid:[1]", 5)
    write_holder(tmp_path, far)
    with (
        open_heartbeat(tmp_path / HEARTBEATS_NAME, World(), 600),
        pytest.raises(ConfigError, match="a run on host gpu003, pid 4711, started 2026-01-02 03:04:05"),
    ):
        RunLock.take(tmp_path)


@pytest.mark.parametrize("phase", ["fetch", ENDED])
def test_a_run_of_another_host_that_beats_no_more_holds_nothing(tmp_path: Path, phase: str) -> None:
    make_heartbeats(tmp_path / HEARTBEATS_NAME)
    write_holder(tmp_path, ProcessId("gpu003", 4711, "another kernel pid:[1]", 5))
    heartbeat = RankHeartbeat(tmp_path / HEARTBEATS_NAME, World())
    heartbeat.at(phase, 3)
    write_beat(tmp_path / HEARTBEATS_NAME, heartbeat.now())
    RunLock.take(tmp_path).release()


class Server:
    """A file server that keeps the lock of a client that is gone, for so many requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, num_refusals: int) -> None:
        self.num_left = num_refusals
        self._kept = folder / LOCK_NAME
        self._inode = self._kept.stat().st_ino
        self._real = fcntl.flock
        monkeypatch.setattr(fcntl, "flock", self._flock)

    def _flock(self, handle: int, operation: int) -> None:
        if self.num_left and os.fstat(handle).st_ino == self._inode:
            self.num_left -= 1
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        self._real(handle, operation)


FAR = ProcessId("gpu003", 4711, "another kernel pid:[1]", 5)


def beaten_once(folder: Path) -> None:
    """Heartbeats of a run that is gone."""
    make_heartbeats(folder / HEARTBEATS_NAME)
    beat = RankHeartbeat(folder / HEARTBEATS_NAME, World()).now()
    write_beat(folder / HEARTBEATS_NAME, beat._replace(interval_seconds=0.1))


def test_the_lock_of_a_lost_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job does that a scheduler starts again elsewhere, while the server still knows the lost node."""
    beaten_once(tmp_path)
    write_holder(tmp_path, FAR)
    server = Server(monkeypatch, tmp_path, 12)
    RunLock.take(tmp_path).release()
    assert server.num_left == 0


def test_the_lock_of_a_lost_host_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder(tmp_path, FAR)
    Server(monkeypatch, tmp_path, 10**6)
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"is in use by a run on host gpu003.*lost for good, remove .*run\.lock"):
        RunLock.take(tmp_path)


def test_the_next_attempt_of_a_launch_takes_over_from_a_lost_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat cannot be told from a living one yet, and the server will never give the lock back."""
    beaten_once(tmp_path)
    content = {"process": vars(FAR), "started": "2026-01-02 03:04:05", "launch": "7f"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(content))
    Server(monkeypatch, tmp_path, 10**6)
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", 0.3)
    with pytest.raises(ConfigError, match="is in use by a run on host gpu003"):
        RunLock.take(tmp_path, "another")
    lock = RunLock.take(tmp_path, "7f")
    monkeypatch.undo()
    held = json.loads((tmp_path / LOCK_NAME).read_text())
    assert (held["process"]["pid"], held["launch"]) == (os.getpid(), "7f")
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        RunLock.take(tmp_path, "7f")  # it is no attempt of before that holds it
    lock.release()
    assert [path.name for path in tmp_path.glob("run.lock*")] == [LOCK_NAME]


@pytest.mark.parametrize("content", ["", "{", '{"process": {}}', '{"process": {"host": "a", "pid": 1, "x": 2}}'])
def test_a_lock_file_that_says_nothing_refuses_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    RunLock.take(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match=r"run\.lock cannot be opened for writing"):
        RunLock.take(tmp_path / "not there")
