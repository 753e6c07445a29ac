"""`launch/test_distributed.sh` and the check that it starts: on this host; over ssh in tests/cluster."""

import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mellow_ds.errors import FaultError
from mellow_ds.preflight.progress import Progress
from mellow_ds.world import World
from tests.cli.runs import environment
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "launch/test_distributed.sh"


def script(*words: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(ROOT / SCRIPT), *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
    )


def test_a_dry_run_shows_the_command() -> None:
    done = script("2", "--interface", "lo", "--dry-run", "--", "--only-values", "--backend", "gloo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks on 1 host")
    assert "-m mellow_ds.preflight.collectives --only-values --backend gloo\n" in done.stdout
    assert "  GLOO_SOCKET_IFNAME=lo\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["two"], "the number of ranks is 'two'"),
        (["0"], "the number of ranks is '0'"),
        (["2", "nothere"], "the hostfile nothere is not there"),
        (["2", "--env-file", "nothere"], "--env-file nothere is not there"),
        (["2", "--env-file"], "--env-file has no value"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    done = script(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_the_help_is_the_header() -> None:
    done = script("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Checks the collectives that training uses")
    assert "Exit codes: 0 all is right" in done.stdout


def stays_away(world: World, first_to_notice: int) -> None:
    """Rank 1 comes to the first thing, and not to the second."""
    progress = Progress(world, 2.0 if world.rank == first_to_notice else 30.0)
    progress.connect()
    progress.at("the first thing")
    dist.barrier()
    if world.rank == 1:
        time.sleep(60)
    progress.at("the second thing")
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("first_to_notice", [0, 1])
def test_a_rank_that_does_not_come_is_named(first_to_notice: int) -> None:
    """By the one that waits, and as well by itself: which of the two says so is a matter of milliseconds."""
    with pytest.raises(FaultError) as fault:
        run_ranks(2, stays_away, first_to_notice)
    behind = "the second thing: rank 1 is still at the first thing (the other ranks did not come within 2 s)"
    assert f"verdict: FAILED at {behind}\n" in str(fault.value)
    assert f"rank {first_to_notice}: ended with code 1" in str(fault.value)
