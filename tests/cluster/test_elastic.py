"""`mellow-ds launch --min-hosts`: a run goes on with the hosts that are left, and takes back one that has returned.

It goes on after a lost host, not after a rank that has failed: a full disk of one host ends the run.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mellow_ds.packing.build import build_shards
from mellow_ds.packing.synthesis.corpus import synthesize
from tests.cli.noting import read_notes
from tests.cli.runs import ROOT, started
from tests.cluster.hosts import FRONT, INTERFACE, Hosts, wait_for
from tests.cluster.runs import (
    START_SECONDS,
    assert_nothing_is_left,
    launch,
    losses,
    processes,
    train_arguments,
    wrote_steps,
)
from tests.guide import quoted

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
NOTING = ROOT / "tests" / "cli" / "noting.py"
STEPS = 100


def noting(corpus: Path, run: Path) -> list[object]:
    """For noting.py: a training that computes the same on any number of ranks, with no dropout and a frozen encoder."""
    arguments = train_arguments(corpus, run, max_steps=STEPS, save_every_steps=10)
    arguments += ["--train.phases", "[{from_step: 0, train: [projector, decoder]}]"]
    arguments += ["--model.encoder.projector_dropout", "0"]
    return [f"--notes={run}-notes", *arguments]


def examples_of_steps(run: Path) -> dict[int, list[str]]:
    """By what was noted last; a step of four examples was cut into two where two ranks took it."""
    notes = [dict(read_notes(Path(f"{run}-notes"), rank)) for rank in (0, 1)]
    return {step: ids + (notes[1][step] if len(ids) < 4 else []) for step, ids in notes[0].items()}


def test_a_run_goes_on_as_if_no_host_had_been_lost(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """On two hosts, on the one that is left, and on both again."""
    run, whole, gate = tmp_path / "run", tmp_path / "whole", tmp_path / "gate"
    checkpoints = run / "checkpoints"
    options = ["--interface", INTERFACE, "--min-hosts", 1]
    with (
        launch(hosts, *options, "--", NOTING, *noting(corpus, run), f"--gate=60:{gate}") as launched,
        started("noting.py", *noting(corpus, whole)) as (alone,),
    ):

        def wait_for_steps(count: int) -> None:
            wait_for(lambda: launched.process.poll() is not None or wrote_steps(run, count), START_SECONDS)

        wait_for(lambda: launched.process.poll() is not None or any(checkpoints.glob("step-*")), START_SECONDS)
        wait_for_steps(15)
        hosts.power_off("node1")  # the first: rank 0 with the lock of the run, and the place where all meet
        launched.wait_for("restart 1 of 3: 1 ranks on node2\n")
        hosts.power_on("node1")
        wait_for_steps(50)
        # lost and found: its agent is killed, its rank is swept, and it answers again
        os.kill(sorted(processes(hosts, "node2", "launcher.agent"))[-1], signal.SIGKILL)
        gate.touch()
        assert launched.end(START_SECONDS) == 0, launched.said()[-3000:]
        undisturbed = alone.end(time.monotonic() + START_SECONDS)
    assert_nothing_is_left(hosts, time.monotonic())
    said = launched.said()
    assert "mellow-ds launch: host node1 (rank 0) is lost: not heard for 15 s" in said
    assert "mellow-ds launch: host node2 (rank 0) is lost: the connection ended with code" in said
    assert "mellow-ds launch: restart 2 of 3: 2 ranks on node1, node2\n" in said
    assert said.count("going on from ") == 2
    log = (run / "logs" / "rank-0.log").read_text()
    assert [line.partition(", ")[2] for line in log.splitlines() if line.startswith("-- started ")] == [
        "attempt 1, on node1, 2 ranks", "attempt 2, on node2, 1 ranks", "attempt 3, on node1, 2 ranks",
    ]  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    examples = examples_of_steps(run)
    assert sorted(examples) == list(range(1, STEPS + 1))
    assert examples == examples_of_steps(whole)
    assert {len(ids) for _, ids in read_notes(Path(f"{run}-notes"), 0)} == {2, 4}


def test_a_full_disk_of_one_host_ends_the_run(hosts: Hosts, tmp_path: Path) -> None:
    """The shards come over the network into a cache on each host's own disk; a third fits on that of node2."""
    synthesize(tmp_path / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
    build_shards(
        [tmp_path / "corpus" / "train.json"], tmp_path / "corpus", tmp_path / "train", workers=1, shard_megabytes=0.2
    )
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    hosts.mount("node2", "-t", "tmpfs", "-o", "size=640k", "mellow-cache", str(cache))
    serve = [sys.executable, "-m", "http.server", "--bind", "10.77.0.254", "--directory", str(tmp_path), "8000"]
    server = subprocess.Popen(hosts.on(FRONT, serve), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    arguments = train_arguments(Path("SHARDS"), run, max_steps=5000, save_every_steps=0)
    arguments[arguments.index("SHARDS")] = "http://10.77.0.254:8000/train"
    arguments += ["--data.cache_folder", str(cache), "--data.shuffle_window", "1", "--data.order_runs", "1"]
    try:
        with launch(hosts, "--interface", INTERFACE, "--min-hosts", 1, "--", "train.py", *arguments) as launched:
            launched.wait_for("is full", seconds=START_SECONDS)
            began = time.monotonic()
            assert launched.end() == 1, launched.said()[-3000:]
            what = f"{quoted('the disk of data.cache_folder')} {cache} is full: "
            expected = f"error: rank 1 on host node2 ended with code 1: {what}"
            assert launched.last_line.startswith(expected), launched.said()[-3000:]
            assert wrote_steps(run, 1)
            assert "restart" not in launched.said()
            assert_nothing_is_left(hosts, began, frozenset([server.pid]))
    finally:
        server.kill()
        server.wait()
