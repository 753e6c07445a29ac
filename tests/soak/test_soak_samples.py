"""A few rounds of each of the long tests; `bash tests/soak.sh` runs them whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(script: str, *arguments: str) -> Any:
    """What a script sums up, where it finds nothing wrong."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "soak" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "reads",
    [
        "audio samples stream",
        "verify webdataset",
    ],
)
def test_a_sample_of_the_mutations(reads: str) -> None:
    found = run("mutations.py", "--rounds", "60", "--reads", *reads.split())
    assert found["rounds"] == 60
    kinds = ("audio", "folder") if "audio" in reads else ("folder",)
    assert min(found[f"{kind} {outcome}"] for kind in kinds for outcome in ("taken", "refused")) > 0


@pytest.mark.slow
def test_a_sample_of_killed_and_resumed_streams() -> None:
    found = run("kill_and_resume.py", "--cycles", "4", "--workers", "0", "--seed", "3")
    assert found["whole_epochs"] >= 1
    assert (found["1 ranks, 0 workers"], found["2 ranks, 0 workers"]) == (2, 2)


@pytest.mark.slow
def test_a_sample_of_builds_with_ever_more_questions() -> None:
    """Four times the questions took 55 MB more before they were kept on disk, 1 kB each."""
    few, many = run("large_build.py", "--records", "15000", "60000", "--clips", "1000", "--shard-megabytes", "8")
    assert (few["questions"], many["questions"]) == (15_000, 60_000)
    for process in ("peak_megabytes", "worker_peak_megabytes"):
        assert few[process] > 0
        assert many[process] - few[process] < 30
