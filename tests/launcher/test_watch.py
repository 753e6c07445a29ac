"""Whole starts on this host, with ranks that are a few lines of Python: codes, lines, logs, and an end for all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


def launching(folder: Path, code: str, *options: str, ranks: int = 2) -> "subprocess.Popen[str]":
    """`mellow-ds launch` of a script, in `folder`."""
    (folder / "rank.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
    command = [sys.executable, "-m", "mellow_ds.cli.main", "launch", "--num-per-host", str(ranks), *options, "--"]
    return subprocess.Popen(
        [*command, "rank.py", str(folder)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]", seconds: float = 90) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr)."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out.splitlines(), err.splitlines()


def wait_for_both(process: "subprocess.Popen[str]") -> None:
    """Until two ranks have said a line each."""
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()


def processes_of(folder: Path) -> list[int]:
    """Ranks of a test, by the folder in their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"rank.py" in words and b"launch" not in words and str(folder).encode() in words:
            found.append(int(entry.name))
    return found


def test_lines_have_the_name_of_their_rank_and_a_file(tmp_path: Path) -> None:
    code = "print('out', rank)\nprint('err', rank, file=sys.stderr)\nprint('no end', end='')"
    result, out, err = ended(launching(tmp_path, code, "--log-dir", "logs"))
    assert result == 0, err
    assert sorted(out) == ["[rank 0] no end", "[rank 0] out 0", "[rank 1] no end", "[rank 1] out 1"]
    assert sorted(err) == ["[rank 0] err 0", "[rank 1] err 1"]
    assert {"out 1", "err 1", "no end"} < set((tmp_path / "logs" / "rank-1.log").read_text().splitlines())


def test_much_output_arrives_whole_and_in_order(tmp_path: Path) -> None:
    code = "for i in range(20000): print(i, 'x' * 200)"
    result, out, _ = ended(launching(tmp_path, code, "--log-dir", "logs"))
    assert result == 0
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()[1:]
        assert [int(line.split()[0]) for line in lines] == list(range(20000))
    assert len(out) > 1000


@pytest.mark.parametrize(
    ("code", "result", "last"),
    [
        ("sys.exit('error: no good' if rank else time.sleep(60))", 1, "error: rank 1 ended with code 1: no good"),
        ("sys.exit(7 if rank else time.sleep(60))", 7, "error: rank 1 ended with code 7; it has no log: no --log-dir"),
        ("os.kill(os.getpid(), signal.SIGSEGV) if rank else time.sleep(60)", 139,
         "error: rank 1 was ended by SIGSEGV (code 139); it has no log: no --log-dir"),
        # the one that is heard first names the one that failed first
        ("time.sleep(0.5 * rank)\nsys.exit(9 if rank else 'error: rank 0: ended because rank 1 failed first: x')",
         9, "error: rank 1 ended with code 9; it has no log: no --log-dir"),
        # a mistake that all find is said by one, whoever ends first
        ("time.sleep(1 - rank)\nprint('' if rank else 'error: rank 0: x', end='', file=sys.stderr)\nsys.exit(2)",
         2, "error: rank 0 ended with code 2: x"),
    ],
)  # fmt: skip
def test_the_first_failing_rank_is_said_last(tmp_path: Path, code: str, result: int, last: str) -> None:
    found, _, err = ended(launching(tmp_path, code))
    assert (found, err[-1]) == (result, last)
    assert len(err) == len(set(err))
    assert not processes_of(tmp_path)


@pytest.mark.parametrize(("codes", "result"), [((0, 0), 0), ((85, 85), 85), ((130, 130), 130)])
def test_orderly_codes_pass_through(tmp_path: Path, codes: tuple[int, int], result: int) -> None:
    found, _, err = ended(launching(tmp_path, f"sys.exit({codes}[rank])"))
    assert (found, err) == (result, [])


@pytest.mark.parametrize(("number", "result"), [(signal.SIGINT, 130), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)])
def test_a_stop_reaches_every_rank_and_is_waited_for(tmp_path: Path, number: signal.Signals, result: int) -> None:
    code = (
        f"def save(*_):\n    time.sleep(1.5)\n    print('saved', flush=True)\n    sys.exit({result})\n"
        f"signal.signal({int(number)}, save)\nprint('at work', flush=True)\ntime.sleep(60)"
    )
    process = launching(tmp_path, code)
    assert process.stdout is not None
    assert [process.stdout.readline()[9:] for _ in range(2)] == ["at work\n"] * 2
    process.send_signal(number)
    found, out, err = ended(process)
    assert found == result, err
    assert sorted(out) == ["[rank 0] saved", "[rank 1] saved"]


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    process = launching(tmp_path, "signal.signal(2, signal.SIG_IGN)\nprint('at work', flush=True)\ntime.sleep(60)")
    wait_for_both(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("once more ends them at once" in line for line in process.stderr)
    time.sleep(0.5)  # so that the ranks have been told
    assert len(processes_of(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 137
    assert not processes_of(tmp_path)


def test_ranks_save_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """Though nobody reads any more what their agent has to say of it."""
    code = (
        "def save(*_):\n    open(f'saved-{rank}', 'w').close()\n    sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('at work', flush=True)\ntime.sleep(60)"
    )
    process = launching(tmp_path, code)
    wait_for_both(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while processes_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_who_ignores_hangups_is_not_stopped_by_one(tmp_path: Path) -> None:
    """As under nohup, when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launching(tmp_path, "print('at work', flush=True)\ntime.sleep(2)")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_both(process)
    process.send_signal(signal.SIGHUP)
    assert ended(process)[0] == 0


def test_a_hangup_is_an_order_to_save(tmp_path: Path) -> None:
    """Ranks that die of what they get for it have not failed."""
    process = launching(tmp_path, "print('at work', flush=True)\ntime.sleep(60)")
    wait_for_both(process)
    process.send_signal(signal.SIGHUP)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGTERM
    assert not [line for line in err if line.startswith("error")]


def test_what_a_finished_rank_leaves_is_ended(tmp_path: Path) -> None:
    code = "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
    assert ended(launching(tmp_path, code), 60)[0] == 0
    assert not processes_of(tmp_path)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mellow_ds.cli.main", "launch", "--num-per-host", "1", "--", "no-such-program"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 127
    assert done.stderr.splitlines()[-1].endswith("cannot start no-such-program: No such file or directory")


def test_an_environment_file_is_sourced_and_stands_above_what_is_set_here(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("echo loading\nexport MELLOW_A=file MELLOW_B=file\n")
    code = "print(os.environ['MELLOW_A'], os.environ['MELLOW_B'])"
    options = ("--env-file", "env.sh", "--python", sys.executable, "--env", "MELLOW_B=named")
    result, out, err = ended(launching(tmp_path, code, *options, ranks=1))
    assert (result, out) == (0, ["[rank 0] file named"]), err
    assert err == ["[localhost] loading"]


def test_an_environment_file_that_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("echo 'module: not found' >&2\nexit 3\n")
    result, _, err = ended(launching(tmp_path, "", "--env-file", "env.sh", ranks=1))
    assert result == 2
    assert err[-1] == (
        "error: host localhost: the connection ended with code 3: module: not found; no rank was started"
    )  # fmt: skip
