"""Watchdogs in processes of their own, without torch: who is ended, who is not, and what is said."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.monitor.endings import first_ending
from mellow_ds.monitor.heartbeat import make_heartbeats, read_beat
from mellow_ds.monitor.watchdog import group_timeout_seconds
from tests.guide import quoted

pytestmark = pytest.mark.slow
RANK = """
import os, sys, time
from pathlib import Path
from mellow_ds.monitor.watchdog import open_heartbeat
from mellow_ds.world import World

rank, size, hang_seconds, folder = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
heartbeat = open_heartbeat(folder, World(rank, size, rank, "a test", size), hang_seconds)

def all_reduce_of_nobody():
    time.sleep(60)

"""
Process = subprocess.Popen[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_heartbeats(tmp_path / "heartbeats")
    return tmp_path / "heartbeats"


class Ranks:
    """Processes that each run a few lines as a rank of a world."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []

    def start(self, *bodies: str, hang_seconds: float = 2.0) -> list[Process]:
        for rank, body in enumerate(bodies):
            command = [sys.executable, "-c", RANK + body, str(rank), str(len(bodies)), str(hang_seconds)]
            self.processes.append(
                subprocess.Popen([*command, str(self.folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                 text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while any((beat := read_beat(self.folder, rank)) is None or not beat.step for rank in range(len(bodies))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.processes


@pytest.fixture
def ranks(folder: Path) -> Iterator[Ranks]:
    made = Ranks(folder)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


def end_of(process: Process, seconds: float = 60.0) -> tuple[int, str]:
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


STANDS = "heartbeat.at('forward-backward', 7, [['a', 'b']]); all_reduce_of_nobody()"
COMPUTES = """
for step in range(1, 7):
    heartbeat.at('forward-backward', step)
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
heartbeat.close()
"""
WORKS = "\nfor n in range(600): heartbeat.at('save', 7); time.sleep(0.1)\nheartbeat.close()"


def test_a_single_rank_that_stands_still_says_where_and_ends(ranks: Ranks, folder: Path) -> None:
    (process,) = ranks.start(STANDS)
    code, said = end_of(process)
    assert code == 1
    lines = said.splitlines()
    assert lines[0].startswith(
        f"error: {quoted('no progress for')} 2 s {quoted('(train.hang_seconds)')}: rank 0 (host {os.uname().nodename}, "
    )
    assert quoted("stands in forward-backward") + " of step 7 (examples a, b)" in lines[0]
    assert "in all_reduce_of_nobody" in lines[-1]
    assert "all_reduce_of_nobody" in (folder / "rank-00000.stacks.txt").read_text()
    assert "heartbeat" in (folder / "rank-00000.stacks.txt").read_text()  # all threads


def test_all_ranks_leave_their_stacks_and_one_speaks(ranks: Ranks, folder: Path) -> None:
    processes = ranks.start(STANDS, STANDS, "heartbeat.at('fetch', 7); all_reduce_of_nobody()", hang_seconds=8.0)
    ends = [end_of(process) for process in processes]
    assert [code for code, _ in ends] == [1, 1, 1]
    said = "".join(text for _, text in ends)
    assert said.count("error: ") == 1
    assert "rank 2 (host" in said
    assert "is behind: it stands in fetch of step 7" in said
    for rank in range(3):
        assert f"rank {rank} stands at (innermost call last):" in ends[rank][1]
        assert "all_reduce_of_nobody" in (folder / f"rank-{rank:05d}.stacks.txt").read_text()


def test_who_waits_for_one_that_gets_further_is_left_alone(ranks: Ranks, folder: Path) -> None:
    """More than twice as long as train.hang_seconds."""
    working, waiting = ranks.start(WORKS, STANDS, hang_seconds=6.0)
    time.sleep(15)
    assert (working.poll(), waiting.poll()) == (None, None)
    assert first_ending(folder) is None


def test_a_stopped_rank_is_named_and_killed(ranks: Ranks) -> None:
    first, second = ranks.start(STANDS, STANDS, hang_seconds=8.0)
    second.send_signal(signal.SIGSTOP)
    code, said = end_of(first)
    assert code == 1
    assert f"pid {second.pid}) is behind: it is stopped (by a signal such as SIGSTOP), last seen in" in said
    assert second.wait(60) == -signal.SIGKILL


def test_where_the_first_rank_is_stopped_the_next_one_speaks(ranks: Ranks) -> None:
    first, second = ranks.start(STANDS, STANDS, hang_seconds=8.0)
    first.send_signal(signal.SIGSTOP)
    code, said = end_of(second)
    assert code == 1
    assert f"pid {first.pid}) is behind: it is stopped" in said
    assert first.wait(60) == -signal.SIGKILL


def test_a_run_that_is_suspended_goes_on_afterwards(ranks: Ranks, folder: Path) -> None:
    """For longer than the limit, in the middle of work that takes its time: only time in which it runs counts."""
    (process,) = ranks.start(COMPUTES, hang_seconds=4.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    assert end_of(process) == (0, "")
    assert first_ending(folder) is None


def test_a_killed_rank_ends_one_that_nothing_else_tells(ranks: Ranks) -> None:
    """As under NCCL: no connection of the waiting rank breaks. It does not take a limit."""
    process, other = ranks.start(STANDS, STANDS, hang_seconds=0.0)
    time.sleep(1.5)  # the neighbours know each other once they have beaten
    other.kill()
    other.wait()
    code, said = end_of(process)
    assert code == 1
    assert said.startswith("error: rank 0: ended because rank 1 failed first: the process (host ")
    assert f"pid {other.pid}) was killed, last seen in forward-backward of step 7 (examples a, b)" in said


def test_a_rank_that_ends_in_order_ends_nobody_else(ranks: Ranks, folder: Path) -> None:
    ends = "heartbeat.at('save', 7); time.sleep(2); heartbeat.close()"
    process, other = ranks.start(STANDS, ends, hang_seconds=600.0)
    assert other.wait(60) == 0
    time.sleep(3)
    assert process.poll() is None
    assert first_ending(folder) is None


def test_a_thread_that_watches_holds_up_no_exit(ranks: Ranks) -> None:
    (process,) = ranks.start("heartbeat.at('fetch', 7); time.sleep(1.5)", hang_seconds=600.0)  # not closed
    assert end_of(process)[0] == 0


@pytest.mark.parametrize("hang_seconds", [1.0, 15.0, 480.0, 600.0, 7200.0])
def test_the_process_group_speaks_after_the_last_watchdog(hang_seconds: float) -> None:
    """The next rank takes over at 1.25 times the limit, and then waits a few seconds for the others' stacks."""
    assert group_timeout_seconds(hang_seconds) > 1.25 * hang_seconds + 20
    assert group_timeout_seconds(hang_seconds) >= 600
    assert group_timeout_seconds(0) > 3600
