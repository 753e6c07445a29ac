"""A few rounds of the long tests of saving and stopping; `bash tests/soak.sh` runs them whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.soak.kill_runs import soak

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> dict[str, Any]:
    """What a script sums up, where it finds nothing wrong."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, str(ROOT / "tests" / "soak" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_sample_of_kills_during_a_save() -> None:
    found = run("kill_during_save.py", "--kills", "10", "--seed", "4")
    assert found["kills"] == 10
    assert found["saves"] > 0
    assert sum(found.get(left, 0) for left in ("begun", "half written", "written", "being published")) > 0


def test_a_sample_of_whole_runs_killed_in_a_save(tmp_path: Path) -> None:
    """FSDP2 on two ranks, saving at every step: one is killed, the other, both; then let through, with equal losses."""
    found = soak(3, ["forked"], ["fsdp2"], 3, tmp_path)
    assert (found["kills"], found["of one rank"], found["of both"]) == (3, 2, 1)
    assert found["of a step again"] == found["waited for"] == 1


def test_a_sample_of_preemptions() -> None:
    found = run("preemption.py", "--rounds", "4", "--seed", "2")
    assert found["right_codes"] == 4
