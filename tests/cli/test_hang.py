"""A run that stands still: the rank that is behind is named, all that can speak say where they are, nobody stays."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import ROOT, TINY, Running, by_deepspeed, by_torchrun, environment, forked, started
from tests.guide import quoted

pytestmark = pytest.mark.slow
HANG_SECONDS = 6
# the last rank to speak does so at 1.25 times the limit, and waits for the others' stacks; a launcher looks each second
SECONDS_TO_END = HANG_SECONDS * 1.25 + 60
BEHIND = re.compile(
    r"^error: no progress for 6 s \(train\.hang_seconds\): rank (\d) \(host \S+, pid (\d+)\) is behind: it (.*); "
    r"stack traces of all ranks are in (\S+)$",
    re.MULTILINE,
)


def training(shards: Path, run: Path, **train: object) -> list[object]:
    more = [word for key, value in train.items() for word in (f"--train.{key}", value)]
    return ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY,
            "--train.max_steps", 100_000, "--train.save_every_steps", 0, "--train.hang_seconds", HANG_SECONDS,
            *more]  # fmt: skip


def has_steps(run: Path, count: int = 3) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and len(read_metrics(path)) >= count


def stacks(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "heartbeats").glob("*.stacks.txt"))


def loader_process(rank: Running) -> psutil.Process:
    (server,) = [p for p in psutil.Process(rank.pid).children() if "forkserver" in " ".join(p.cmdline())]
    (loader,) = server.children()
    return loader


def test_a_loader_process_that_delivers_nothing(shards: Path, tmp_path: Path) -> None:
    """Stopped, as one is that reads from a file system which hangs: the rank itself goes on beating."""
    with started("train.py", *training(shards, tmp_path, num_workers=1), num_ranks=2) as ranks:
        ranks[0].wait_for(has_steps(tmp_path))
        loader = loader_process(ranks[1])
        loader.suspend()
        deadline = time.monotonic() + SECONDS_TO_END
        first, second = (rank.end(deadline) for rank in ranks)
        psutil.wait_procs([loader], timeout=30)  # stopped, it could not end by itself; killed, it takes a moment
        assert not loader.is_running() or loader.status() == psutil.STATUS_ZOMBIE
    assert (first.returncode, second.returncode) == (1, 1)
    (found,) = BEHIND.findall(first.stderr + second.stderr)
    assert BEHIND.findall((tmp_path / "log.txt").read_text()) == [found]  # whichever rank said it
    assert found[0] == "1"
    assert found[2].startswith(quoted("stands in fetch") + " of step ")
    assert ", at data/loader.py:" in found[2]  # of our own code; the call that blocks is one of Python's
    assert "mellow_ds/data/loader.py" in second.stderr
    assert f"rank 0 {quoted('stands at')} (innermost call last):" in first.stderr
    assert "all_reduce" in first.stderr
    assert stacks(tmp_path) == ["rank-00000.stacks.txt", "rank-00001.stacks.txt"]
    assert "__next__" in (tmp_path / "heartbeats" / "rank-00001.stacks.txt").read_text()


@pytest.mark.parametrize(("launcher", "which"), [(by_torchrun, 1), (by_deepspeed, 0)])
def test_a_stopped_rank_under_a_launcher(
    launcher: Callable[..., list[str]], which: int, shards: Path, tmp_path: Path
) -> None:
    """Case 15. Neither launcher would get rid of it for half a minute: SIGTERM does not reach a stopped process."""
    run, said = tmp_path / "run", tmp_path / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(
            launcher(*training(shards, run)), cwd=ROOT, env=environment(), stderr=file, stdout=file
        )
        family: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 200
            while not has_steps(run)():
                assert process.poll() is None, said.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            family = psutil.Process(process.pid).children(recursive=True)
            stopped = next(p for p in family if "train.py" in p.cmdline() and p.environ().get("RANK") == str(which))
            stopped.suspend()
            code = process.wait(SECONDS_TO_END)
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive
        finally:
            for left in [p for p in family if p.is_running()]:
                left.kill()
            process.kill()
            process.wait()
    assert code != 0
    (found,) = BEHIND.findall(said.read_text())
    assert (int(found[0]), int(found[1])) == (which, stopped.pid)
    assert found[2].startswith(quoted("is stopped (by a signal such as SIGSTOP)") + ", last seen in ")
    assert found[3] == str(run / "heartbeats")
    assert f"rank {1 - which} stands at (innermost call last):" in said.read_text()
    assert stacks(run) == [f"rank-{1 - which:05d}.stacks.txt"]
    if launcher is by_torchrun:
        assert "no progress for 6 s" in said.read_text().split("Root Cause")[1]


def test_saving_and_evaluating_are_progress(shards: Path, tmp_path: Path) -> None:
    """With a limit of seconds, and more of them to evaluate; ranks take leave of one another without a word."""
    arguments = training(shards, tmp_path, max_steps=4, evaluate_at_end="true")
    arguments += ["--evaluation.max_new_tokens", 300, "--evaluation.batch_size", 1]
    for done in forked("train.py", *arguments, "--data.eval_shards", shards / "test", num_ranks=2):
        assert done.returncode == 0, done.stderr[-3000:]
        assert "error: " not in done.stderr
    beat = (tmp_path / "heartbeats" / "rank-00001.json").read_text()
    assert '"phase": "ended"' in beat
    assert (tmp_path / "heartbeats" / "endings.jsonl").read_bytes() == b""
    assert stacks(tmp_path) == []


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_leaves_it_free(shards: Path, tmp_path: Path) -> None:
    with started("train.py", *training(shards, tmp_path)) as (first,):
        first.wait_for(has_steps(tmp_path))
        seconds = forked("train.py", *training(shards, tmp_path), num_ranks=2, seconds=60)
        assert [rank.returncode for rank in seconds] == [2, 2], [rank.stderr[-2000:] for rank in seconds]
        said = "".join(rank.stderr for rank in seconds)
        (line,) = re.findall(r"^error: .*$", said, re.MULTILINE)
        assert f"{tmp_path} {quoted('is in use by a run on host')} {os.uname().nodename}, pid {first.pid}, " in line
        assert "choose another save_dir" in line
        (evaluated,) = forked(  # what is there may be looked at all the while
            "train.py", "--mode", "evaluate_checkpoint", "--checkpoint_path", shards, *training(shards, tmp_path)
        )
        assert "is in use" not in evaluated.stderr
        os.kill(first.pid, signal.SIGKILL)
        first.end(time.monotonic() + 10)
        (third,) = forked("train.py", *training(shards, tmp_path, max_steps=4))
        assert third.returncode == 0, third.stderr[-3000:]
