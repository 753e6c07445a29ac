"""`launch/check_env.py`: the table that marks what differs, and what a rank says that is alone or told wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from mellow_ds.preflight.rank_view import table
from tests.cli.runs import environment
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent.parent


def check_env(seconds: float = 100, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "launch/check_env.py", "--timeout", "1"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=seconds
    )


def test_what_differs_is_marked_unless_it_is_meant_to() -> None:
    common = {"torch": "2.11.0", "NCCL_DEBUG": "WARN", "host": "a", "address": "10.0.0.1"}
    views = [
        {"rank": "0 of 4", "RANK": "0", **common},
        {"rank": "1 of 4", "RANK": "1", **common, "OMP_NUM_THREADS": "2"},
        {"rank": "2 of 4", "RANK": "2", **common, "host": "b", "address": "10.0.0.2"},
        {"rank": "3 of 4", "RANK": "3", **common, "host": "b", "address": "10.0.0.2", "torch": "2.10.0"},
    ]
    title, *lines = table(views)
    assert title == "4 ranks; * differs between them"
    assert {line.split()[1] for line in lines if line.startswith("*")} == {"torch", "OMP_NUM_THREADS"}
    by_name = {line[2:].split()[0]: line[27:] for line in lines}
    assert by_name["torch"] == "0-2: 2.11.0 | 3: 2.10.0"
    assert by_name["OMP_NUM_THREADS"] == "0,2-3: - | 1: 2"
    assert by_name["host"] == "0-1: a | 2-3: b"
    assert by_name["NCCL_DEBUG"] == "WARN"
    # hosts of one address are one host: two names for it are a fault
    odd = table([views[0], {**views[0], "host": "other"}])
    assert next(line for line in odd if " host " in line).startswith("*")


def test_a_rank_alone() -> None:
    done = check_env(NCCL_DEBUG="WARN", HF_TOKEN="hidden", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    rows = dict(line[2:].split(None, 1) for line in done.stdout.splitlines()[1:] if len(line.split()) == 2)
    assert rows["NCCL_DEBUG"] == "WARN"
    assert rows["SLURM_JOB_ID"] == "7"
    assert "hidden" not in done.stdout
    assert "  started by               none" in done.stdout


def test_a_rank_that_is_told_wrong_shows_what_it_was_told() -> None:
    done = check_env(RANK="3")
    assert done.returncode == 2
    assert "  RANK                     3" in done.stdout
    assert done.stderr.startswith("error: RANK is set but WORLD_SIZE is not")


@pytest.mark.slow
def test_ranks_that_do_not_meet_print_their_own() -> None:
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = check_env(**place)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"  meets at                 127.0.0.1:{place['MASTER_PORT']}" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: rank 0 has not met the others: ")
