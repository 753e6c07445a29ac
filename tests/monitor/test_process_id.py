"""Processes that run, are stopped, are gone, or are others than they seem, told apart with real ones."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mellow_ds.monitor.process_id import ProcessId, State, descendants, host_number

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def of(process: subprocess.Popen[bytes]) -> ProcessId:
    found = {other.pid: other for other in descendants(os.getpid())}
    return found[process.pid]


def comes_to(process: ProcessId, state: State) -> bool:
    deadline = time.monotonic() + 10
    while process.state() != state and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.state() == state


def test_this_process_runs() -> None:
    own = ProcessId.own()
    assert own.state() == "runs"
    assert str(own) == f"host {own.host}, pid {os.getpid()}"


def test_a_process_is_seen_to_run_stop_go_on_and_end(sleeper: subprocess.Popen[bytes]) -> None:
    process = of(sleeper)
    assert process.state() == "runs"
    sleeper.send_signal(signal.SIGSTOP)
    assert comes_to(process, "stopped")
    sleeper.send_signal(signal.SIGCONT)
    assert comes_to(process, "runs")
    sleeper.kill()
    assert comes_to(process, "gone")  # while it is a zombie
    sleeper.wait()
    assert process.state() == "gone"


def test_a_stopped_process_can_be_killed(sleeper: subprocess.Popen[bytes]) -> None:
    process = of(sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    assert comes_to(process, "stopped")
    assert process.kill()
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not process.kill()


@pytest.mark.parametrize("change", [{"started": 1}, {"place": "another kernel pid:[1]"}, {"place": ""}])
def test_another_process_of_that_number_is_left_alone(
    sleeper: subprocess.Popen[bytes], change: dict[str, object]
) -> None:
    other = dataclasses.replace(of(sleeper), **change)
    assert other.state() == ("gone" if "started" in change else "unknown")
    assert not other.kill()
    assert sleeper.poll() is None


def test_descendants_are_those_of_children_too() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert {parent.pid, child} <= {process.pid for process in descendants(os.getpid())}
        assert [process.pid for process in descendants(parent.pid)] == [child]
        assert descendants(child) == []
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait()


def test_processes_of_a_host_have_one_number() -> None:
    """That another network has another is seen where a link is cut (tests/cluster/test_families.py)."""
    code = "from mellow_ds.monitor.process_id import host_number; print(host_number())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == host_number() < 2**62
