"""Restarts after lost hosts, with real agents and ranks on this host under the names of several."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.launcher import watch
from mellow_ds.launcher.attempts import Attempts
from mellow_ds.launcher.hostfile import Host
from mellow_ds.launcher.output import Output
from mellow_ds.launcher.plan import LaunchPlan, place_ranks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
# what each rank does: the agent of host b is killed where a test says so, which loses the host
RANK = """
import os, pathlib, signal, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = pathlib.Path(sys.argv[1])
print("at work", rank, "of", size, flush=True)
def lose_host(number=signal.SIGKILL):
    time.sleep(0.5)  # so that what was said is heard
    os.kill(os.getppid(), number)
    time.sleep(60)
def is_first():
    try:
        (folder / "was-here").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
"""


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_OUT_OF_SIGHT_SECONDS", 1.0)


class Case:
    """A run on the hosts a and b, of which b can be told not to answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = folder / "calls-of-b"

    def run(
        self, code: str, min_hosts: int = 1, max_restarts: int = 3, b_fails_at: str = "none", b_hangs_at: str = "none"
    ) -> int:
        """The exit code.

        `b_fails_at`: which connections to b fail, as digits from 1 (1 is that of the first start); `b_hangs_at`: at
        which ones nothing answers.
        """
        (self.folder / "rank.py").write_text(RANK + code)
        agent = [sys.executable, "-m", "mellow_ds.launcher.agent"]
        # counts its calls, one letter each
        count = f'echo -n x >>"{self._calls}"; case "{b_fails_at}" in *$(wc -c <"{self._calls}")*) exit 255;; esac; '
        count += f'case "{b_hangs_at}" in *$(wc -c <"{self._calls}")*) exec sleep 600;; esac; '
        b = ["bash", "-c", count + 'exec "$@"', "b", *agent]
        plan = LaunchPlan(
            hosts=place_ranks([Host("a", (0,)), Host("b", (0,))]),
            command=(sys.executable, "rank.py", str(self.folder)), folder=str(self.folder), launch_id=f"{id(self)}",
            min_hosts=min_hosts, max_restarts=max_restarts,
        )  # fmt: skip
        # connections start in /, as those to other hosts do
        commands = {"a": ["env", f"PYTHONPATH={ROOT}", *agent], "b": ["env", f"PYTHONPATH={ROOT}", *b]}
        output = Output(self.folder / "logs")
        try:
            return Attempts(plan, commands, output, stop_seconds=5).run()
        finally:
            output.close()

    @property
    def num_calls(self) -> int:
        """Connections to b."""
        return self._calls.stat().st_size


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    """A case; no rank of it is left."""
    yield Case(tmp_path)
    deadline = time.monotonic() + 30
    while left := ranks_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[Path]:
    """Ranks of a case that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"rank.py", str(folder).encode()]:
            found.append(path)
    return found


@pytest.mark.parametrize("code", ["pass", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))"])
def test_a_host_that_is_shut_down_is_lost(case: Case, capfd: pytest.CaptureFixture[str], code: str) -> None:
    """In order, and whether its rank saves or not: the run goes on with the other."""
    assert case.run(code + "\n" + LOSE_B_ONCE.replace("lose_host()", "lose_host(signal.SIGTERM)"), b_fails_at="2") == 0
    out, err = capfd.readouterr()
    assert "[a rank 0] at work 0 of 1" in out.splitlines()
    assert "host b (rank 1) is lost: its processes are being ended (SIGTERM), as when a host is shut down" in err


LOSE_B_ONCE = "lose_host() if rank == 1 and is_first() else time.sleep(60 if size == 2 and rank == 0 else 0)\n"


def test_a_host_that_does_not_answer_is_left_out(
    case: Case, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_OUT_OF_SIGHT_SECONDS", 5.0)
    began = time.monotonic()
    assert case.run(LOSE_B_ONCE, b_fails_at="2") == 0
    assert time.monotonic() - began > 5  # it may only be cut off from here, and had to have the time to end its rank
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [
        "[a rank 0] at work 0 of 1", "[a rank 0] at work 0 of 2", "[b rank 1] at work 1 of 2",
    ]  # fmt: skip
    notes = [line.removeprefix("mellow-ds launch: ") for line in err.splitlines()]
    assert notes[-3].startswith("host b (rank 1) is lost: the connection ended with code")
    assert notes[-3].endswith("; asking all hosts for restart 1 of 3")
    assert notes[-2] == "host b is left out: the connection ended with code 255"
    assert notes[-1] == "restart 1 of 3: 1 ranks on a"
    log = (case.folder / "logs" / "rank-0.log").read_text().splitlines()
    assert [line.partition(", ")[2] or line for line in log] == [
        "attempt 1, on a, 2 ranks", "at work 0 of 2", "attempt 2, on a, 1 ranks", "at work 0 of 1",
    ]  # fmt: skip


def test_a_host_that_answers_again_takes_part(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    code = "lose_host() if rank == 1 and is_first() else time.sleep(60 if len(list(folder.glob('was*'))) < 1 else 1)\n"
    code = f"time.sleep(0.5 * (1 - rank))\n{code}"
    assert case.run(code) == 0
    assert "mellow-ds launch: restart 1 of 3: 2 ranks on a, b\n" in capfd.readouterr().err


def test_a_rank_that_fails_of_the_loss_is_not_what_ended_the_run(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Its connection to the lost rank breaks before the launcher notices."""
    code = (
        "if rank == 1:\n    (folder / 'soon').touch()\n    time.sleep(1)\n    lose_host()\n"
        "while size == 2 and not (folder / 'soon').exists():\n    time.sleep(0.05)\n"
        "sys.exit('error: broken' if size == 2 else 0)\n"
    )
    assert case.run(code, b_fails_at="2") == 0
    assert "restart 1 of 3: 1 ranks on a" in capfd.readouterr().err


def test_a_world_that_cannot_run_is_not_started_for_ever(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """What is left refuses what it is given."""
    code = "lose_host() if size == 2 and rank == 1 else time.sleep(60) if size == 2 else sys.exit(2)\n"
    assert case.run(code, b_fails_at="2") == 2
    assert "restart 2 of 3" not in capfd.readouterr().err


def test_every_loss_counts(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.run("lose_host() if rank == 1 else time.sleep(60)\n", max_restarts=2) == 1
    err = capfd.readouterr().err
    assert "restart 2 of 2: 2 ranks on a, b" in err
    assert err.splitlines()[-1].startswith("error: host b (rank 1) is lost: ")
    assert err.splitlines()[-1].endswith("; the other ranks were ended; restarted 2 times already")


def test_too_few_hosts_end_the_run(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.run(LOSE_B_ONCE, min_hosts=2, b_fails_at="2") == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith("; the other ranks were ended; 1 of 2 hosts can go on, --min-hosts is 2")


def test_a_host_that_is_lost_while_it_starts_again(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """It answers when asked, and is gone when its ranks are to start."""
    assert case.run(LOSE_B_ONCE, b_fails_at="3 4") == 0
    err = capfd.readouterr().err
    assert "restart 1 of 3: 2 ranks on a, b" in err
    assert "host b: the connection ended with code 255; asking all hosts for restart 2 of 3" in err
    assert "restart 2 of 3: 1 ranks on a" in err
    assert case.num_calls == 4


def test_the_first_start_needs_all_hosts(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.run(LOSE_B_ONCE, b_fails_at="1") == 2
    assert capfd.readouterr().err == "error: host b: the connection ended with code 255; no rank was started\n"


def test_ctrl_c_between_two_attempts(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """While a host is asked that takes its time."""

    def press() -> None:
        deadline = time.monotonic() + 120
        while case.num_calls < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    (case.folder / "calls-of-b").touch()
    presser = threading.Thread(target=press)
    presser.start()
    assert case.run(LOSE_B_ONCE, b_hangs_at="2") == 130
    presser.join()
    assert capfd.readouterr().err.splitlines()[-1] == (
        "mellow-ds launch: stopped before the restart; what is saved is the newest checkpoint"
    )
