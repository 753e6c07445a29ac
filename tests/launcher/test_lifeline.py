"""A rank's hold on what started it: which processes it watches, and its end when one of them is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mellow_ds.launcher.lifeline import what_holds
from mellow_ds.monitor.process_id import ProcessId, ancestors

ROOT = Path(__file__).resolve().parent.parent.parent
RANK = """
import os, signal, sys, time
from mellow_ds.launcher import lifeline
lifeline._POLL_SECONDS = 0.1
lifeline._GRACE_SECONDS = 1.0 if {"stuck", "stopping"} & set(sys.argv) else 30.0
heard = []
if "stuck" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
if "stopping" in sys.argv:
    heard.append(0)  # a signal that was heard before
print(*[what for what, _ in lifeline.what_holds(os.getpid())], sep=", ", flush=True)
lifeline.hold_on(lambda: heard)
print("at work", flush=True)
while 1 not in heard:
    time.sleep(0.05)
sys.exit(85)
"""


@contextlib.contextmanager
def chain(tmp_path: Path, *names: str, words: str = "", before: str = "") -> Iterator[Callable[[], str]]:
    """A rank below processes that are called `names`, the highest first; its code goes into a file.

    Gives what reads the next line of the rank; none of the processes outlives the block.
    """
    (tmp_path / "rank.py").write_text(RANK)
    command = f"{before} {sys.executable} {tmp_path}/rank.py {words}; echo $? > {tmp_path}/code"
    for number, name in enumerate(reversed(names)):
        script = tmp_path / f"level-{number}"
        script.write_text(command + "\n")
        command = f"(exec -a '{name}' bash {script}); true"
    process = subprocess.Popen(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield lambda: process.stdout.readline().strip()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("names", "before", "held"),
    [
        (["sshd: me@notty", "bash"], "", "its launcher, the ssh connection"),
        (["sshd-session: me@notty", "bash", "torchrun"], "", "its launcher, the ssh connection"),
        (["sshd: me@notty", "bash"], "trap '' HUP;", "its launcher"),  # nohup
        (["sshd: me@notty"], "trap '' HUP; exec setsid bash -c", ""),  # and in the shell that the line was typed into
        (["sshd: me@pts/0", "bash"], "", "its launcher"),  # the terminal sends SIGHUP by itself
        (["a", "python -m deepspeed.launcher.launch"], "", "its launcher, what started its launcher"),
    ],
)
def test_what_it_holds_on_to(tmp_path: Path, names: list[str], before: str, held: str) -> None:
    with chain(tmp_path, *names, before=before) as next_line:
        assert next_line() == held


@pytest.mark.parametrize(
    ("words", "code"),
    [("", "85"), ("stuck", "1"), ("stopping", "1")],  # asked to stop; ended; not asked a second time, and ended
)
def test_it_ends_when_the_connection_is_gone(tmp_path: Path, words: str, code: str) -> None:
    with chain(tmp_path, "sshd: me@notty", "bash", words=words) as next_line:
        assert next_line() == "its launcher, the ssh connection"
        assert next_line() == "at work"
        session = next(one for one in ancestors_of_rank(tmp_path) if "@notty" in words_of(one.pid))
        os.kill(session.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (tmp_path / "code").read_text().strip() == code


def test_ancestors_are_those_above() -> None:
    above = ancestors(os.getpid())
    assert above[0].pid == os.getppid()
    assert above[0].state() == "runs"
    assert len({one.pid for one in above}) == len(above)
    assert what_holds(os.getpid())[0] == ("its launcher", above[0])


def ancestors_of_rank(tmp_path: Path) -> list[ProcessId]:
    listed = subprocess.run(["pgrep", "-f", f"^{sys.executable} {tmp_path}/rank.py"], capture_output=True, text=True)
    return ancestors(int(listed.stdout.split()[0]))


def words_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
