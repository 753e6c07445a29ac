"""A rank above 0 that fails alone: it is heard, its message is the last one, and the run ends, however it was started.

Under torchrun, under DeepSpeed's launcher, and as bare processes of which nobody ends the other (`srun python`).
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mellow_ds.monitor.metrics import read_metrics
from tests.cli.damage import damage_audio, sample_keys
from tests.cli.faulty import MESSAGE
from tests.cli.runs import ROOT, TINY, Running, by_deepspeed, by_torchrun, environment, forked, started
from tests.guide import quoted

pytestmark = pytest.mark.slow
NAMED = re.compile(r"^error: rank (\d): .*, sample (\w+) at offset \d+: its checksum", re.MULTILINE)
SECONDS_TO_END = 30


def training(shards: Path, run: Path, max_steps: int = 50, **train: object) -> list[object]:
    """Two examples a step, one a rank."""
    more = [word for key, value in train.items() for word in (f"--train.{key}", value)]
    return ["--config", "quickstart", "--data.shards", shards, "--save-dir", run, *TINY,
            "--train.global_batch_size", 2, "--train.max_steps", max_steps, "--train.save_every_steps", 0,
            *more]  # fmt: skip


def wrote_steps(run: Path, count: int) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and len(read_metrics(path)) >= count


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in a for a in p.info["cmdline"] or ())]


@contextlib.contextmanager
def launched_run(command: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher at work and the file with all that it and its ranks say; nothing of it stays."""
    said = folder / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=file, stdout=file)
        try:
            yield process, said
        finally:
            for left in [process, *processes_of(folder)]:
                left.kill()
            process.wait()


def wait_for_line(process: subprocess.Popen[bytes], said: Path, found: Callable[[str], object]) -> None:
    deadline = time.monotonic() + 200
    while not found(said.read_text()):
        assert process.poll() is None or found(said.read_text()), said.read_text()[-3000:]
        assert time.monotonic() < deadline, said.read_text()[-3000:]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def damaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Shards with one damaged sample, which of two ranks only the second one reads in the first step; its key.

    Which one that is the product says itself: with all samples damaged each rank names the first that it reads.
    """
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(shards / "train", folder / "all")
    for key in sample_keys(folder / "all" / "shard-000000.tar"):
        damage_audio(folder / "all" / "shard-000000.tar", key)
    ranks = forked("train.py", *training(folder / "all", folder / "run"), num_ranks=2)
    named = dict(found for rank in ranks for found in NAMED.findall(rank.stderr))
    assert named.keys() == {"0", "1"}, [rank.stderr[-2000:] for rank in ranks]
    assert named["0"] != named["1"]
    shutil.copytree(shards / "train", folder / "one")
    damage_audio(folder / "one" / "shard-000000.tar", named["1"])
    return folder / "one", named["1"]


@pytest.mark.parametrize("launcher", [by_deepspeed, by_torchrun])
def test_bad_data_on_one_rank_is_the_last_thing_said(
    launcher: Callable[..., list[str]], damaged: tuple[Path, str], tmp_path: Path
) -> None:
    shards, key = damaged
    with launched_run(launcher(*training(shards, tmp_path / "run")), tmp_path) as (process, said):
        wait_for_line(process, said, NAMED.search)
        code = process.wait(timeout=SECONDS_TO_END)  # from when it is heard to when all is over
        assert not processes_of(tmp_path)
    assert code != 0
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert NAMED.match(errors[0]) is not None
    assert NAMED.findall(errors[0]) == [("1", key)]
    for line in errors[1:]:  # of rank 0, where its launcher let it speak
        assert line.startswith("error: rank 0: ended because rank 1 failed first: ")
        assert f"sample {key} at offset" in line
    assert f'File "{ROOT}/mellow_ds' not in said.read_text()  # torchrun shows a traceback of its own
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize("place", ["data", "forward", "optimizer", "save"])
def test_bare_processes_end_one_another_in_the_words_of_the_first(place: str, shards: Path, tmp_path: Path) -> None:
    arguments = training(shards / "train", tmp_path, max_steps=5)
    ranks = forked("faulty.py", f"--fault={place}", *arguments, num_ranks=2, seconds=120)
    assert [rank.returncode for rank in ranks] == [1, 1], [rank.stderr[-2000:] for rank in ranks]
    assert last_line(ranks[1].stderr).startswith("error: rank 1: ")
    assert MESSAGE in last_line(ranks[1].stderr)
    assert last_line(ranks[0].stderr) == (
        f"error: rank 0: {quoted('ended because rank 1 failed first')}: ValueError: {MESSAGE}"
    )  # fmt: skip
    assert last_line((tmp_path / "log.txt").read_text()) == last_line(ranks[0].stderr)
    assert "Traceback" not in ranks[0].stderr
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_a_gpu_without_memory_is_one_line_with_what_to_do(shards: Path, tmp_path: Path) -> None:
    """The error is the one that torch raises; there is no GPU here to fill."""
    ranks = forked("faulty.py", "--fault=memory", *training(shards / "train", tmp_path), num_ranks=2, seconds=120)
    assert [rank.returncode for rank in ranks] == [1, 1], [rank.stderr[-2000:] for rank in ranks]
    said = f"{quoted('the GPU has no memory left')} (CUDA out of memory. Tried to allocate 2.00 GiB): take a smaller "
    assert last_line(ranks[1].stderr).startswith(f"error: rank 1: {said}")
    assert said in last_line(ranks[0].stderr)
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr


def test_a_failed_rank_that_cannot_end_is_ended_with_the_others(shards: Path, tmp_path: Path) -> None:
    """Its connections stay open: without a heartbeat rank 0 waits in a collective until its time-out."""
    with started("faulty.py", "--fault=stay", *training(shards / "train", tmp_path), num_ranks=2) as ranks:
        endings = tmp_path / "heartbeats" / "endings.jsonl"
        ranks[1].wait_for(lambda: endings.exists() and endings.stat().st_size > 0)
        deadline = time.monotonic() + SECONDS_TO_END
        first, second = (rank.end(deadline) for rank in ranks)
    assert (first.returncode, second.returncode) == (1, 1)
    assert last_line(first.stderr) == f"error: rank 0: ended because rank 1 failed first: ValueError: {MESSAGE}"


@pytest.mark.parametrize(
    ("launcher", "place"), [(by_deepspeed, "optimizer"), (by_deepspeed, "save"), (by_torchrun, "save")]
)
def test_under_a_launcher_the_first_message_is_the_last(
    launcher: Callable[..., list[str]], place: str, shards: Path, tmp_path: Path
) -> None:
    command = launcher(f"--fault={place}", *training(shards / "train", tmp_path / "run", max_steps=5))
    command[command.index("train.py")] = "tests/cli/faulty.py"
    with launched_run(command, tmp_path) as (process, said):
        wait_for_line(process, said, lambda text: f"ValueError: {MESSAGE}" in text)
        code = process.wait(timeout=SECONDS_TO_END)
        assert not processes_of(tmp_path)
    assert code == 1
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert errors
    assert all(MESSAGE in line for line in errors), errors
    if launcher is by_torchrun:  # whose closing report would otherwise say where to read on
        report = said.read_text().split("Root Cause")[1]
        assert f"rank 1: ValueError: {MESSAGE}" in report


def test_a_killed_rank_is_named_at_once_and_the_run_goes_on_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    """Case 14: SIGKILL in the middle of a step; the engine is DeepSpeed."""
    long = {"max_steps": 24, "save_every_steps": 5, "global_batch_size": 4}
    (tmp_path / "whole").mkdir()
    for done in forked("train.py", *training(shards / "train", tmp_path / "whole", **long), num_ranks=2):
        assert done.returncode == 0, done.stderr[-3000:]
    arguments = training(shards / "train", tmp_path / "cut", **long)
    gate = tmp_path / "gate"  # the run does not end before the kill
    noting = [f"--notes={tmp_path / 'notes'}", f"--gate=12:{gate}"]
    with started("noting.py", *noting, *arguments, num_ranks=2) as ranks:
        ranks[0].wait_for(wrote_steps(tmp_path / "cut", 8))
        pid = ranks[1].pid
        os.kill(pid, signal.SIGKILL)
        gate.touch()
        deadline = time.monotonic() + 60
        first, second = (rank.end(deadline) for rank in ranks)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "error: rank 0: ended because rank 1 failed first: the process (host " in last_line(first.stderr)
    assert f"pid {pid}) {quoted('was killed, last seen in')} " in last_line(first.stderr)
    assert "Traceback" not in first.stderr
    assert losses(tmp_path / "cut") != losses(tmp_path / "whole")
    for done in forked("train.py", *arguments, num_ranks=2):
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


def test_a_killed_loader_process_is_one_clear_line(shards: Path, tmp_path: Path) -> None:
    """Of rank 1: rank 0 waits for it in a collective, and says what it said."""
    arguments = training(shards / "train", tmp_path, max_steps=100_000, num_workers=1)
    with started("train.py", *arguments, num_ranks=2) as ranks:
        ranks[0].wait_for(wrote_steps(tmp_path, 3))
        loader_process(ranks[1]).kill()
        deadline = time.monotonic() + SECONDS_TO_END
        first, second = (rank.end(deadline) for rank in ranks)
    assert (first.returncode, second.returncode) == (1, 1)
    line = last_line(second.stderr)
    assert line.startswith(f"error: rank 1: {quoted('a loader process died')} (")
    assert "lower train.num_workers or train.batch_size" in line
    assert second.stderr.count("error: ") == 1
    assert (
        last_line(first.stderr) == f"error: rank 0: ended because rank 1 failed first: {line[len('error: rank 1: ') :]}"
    )
    assert "Traceback" not in first.stderr + second.stderr


def loader_process(rank: Running) -> psutil.Process:
    """The only process whose parent is the fork server of this rank."""
    (server,) = [p for p in psutil.Process(rank.pid).children() if "forkserver" in " ".join(p.cmdline())]
    (loader,) = server.children()
    return loader


def test_a_run_folder_that_only_rank_0_finds_impossible_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    """As bare processes: rank 1 would wait for rank 0, for as long as a collective may take, and nobody ends it."""
    run = tmp_path / ("x" * 300)  # nothing is wrong with the folder above it
    began = time.monotonic()
    first, second = forked("train.py", *training(shards / "train", run), num_ranks=2)
    assert time.monotonic() - began < SECONDS_TO_END
    assert (first.returncode, second.returncode) == (1, 1), first.stderr[-2000:]
    assert last_line(first.stderr).startswith(f"error: rank 0: save_dir {run} cannot be used (File name too long)")
