"""The SLURM array script: which part a task builds, and mistakes in one line. No SLURM is needed."""

import os
import subprocess
from pathlib import Path

import pytest

from mellow_ds.errors import EXIT_DONE, EXIT_USER

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm" / "build_shards.sbatch"


def run(*arguments: str, cwd: Path = SCRIPT.parents[2], **slurm: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MELLOW_"))}
    environment.update({f"SLURM_{name}": value for name, value in slurm.items()})
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def array(task: int, first: int, last: int, count: int) -> dict[str, str]:
    """What SLURM tells a task of an array."""
    places = {"TASK_ID": task, "TASK_MIN": first, "TASK_MAX": last, "TASK_COUNT": count}
    return {f"ARRAY_{name}": str(value) for name, value in places.items()}


def test_help_tells_how_to_submit() -> None:
    done = run("--help")
    assert done.returncode == EXIT_DONE
    assert "sbatch --array=0-15" in done.stdout
    assert "--dry-run" in done.stdout


def test_a_task_builds_its_part_with_the_arguments_as_they_came() -> None:
    given = ["--json", "a b.json", "--audio-root", "$HOME/x"]
    done = run("--dry-run", *given, **array(3, 0, 15, 16), CPUS_PER_TASK="8")
    assert done.stdout == (
        "python -m shards build --num-parts 16 --part 3 --workers 8 --json a\\ b.json --audio-root \\$HOME/x\n"
    )
    assert done.returncode == EXIT_DONE


def test_a_part_is_run_again_when_told_how_many_there_are() -> None:
    for number in (["--num-parts", "16"], ["--num-parts=16"]):
        done = run("--dry-run", *number, "--workers", "2", **array(7, 3, 7, 2))
        assert done.stdout == "python -m shards build --num-parts 16 --part 7 --workers 2\n"


@pytest.mark.parametrize(
    ("slurm", "named"), [({}, "no task of a SLURM array"), (array(7, 3, 7, 2), "give --num-parts N")]
)
def test_a_mistake_is_one_line(slurm: dict[str, str], named: str) -> None:
    done = run("--dry-run", **slurm)
    assert done.returncode == EXIT_USER
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    done = run("--dry-run", **array(0, 0, 1, 2), SUBMIT_DIR=str(tmp_path))
    assert done.returncode == EXIT_USER
    assert f"{tmp_path} is not the root of the clone" in done.stderr
