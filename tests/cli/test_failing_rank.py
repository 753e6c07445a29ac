"""A rank above 0 that fails alone is heard, and the run ends: under both launchers, with a fault of the real world."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cli.damage import damage_audio, sample_keys
from tests.cli.runs import ROOT, TINY, by_deepspeed, by_torchrun, environment, forked

pytestmark = pytest.mark.slow
NAMED = re.compile(r"^error: rank (\d): .*, sample (\w+) at offset \d+: its checksum", re.MULTILINE)


def training(shards: Path, run: Path) -> list[object]:
    """Two examples a step, one a rank."""
    return ["--config", "quickstart", "--data.shards", shards, "--save-dir", run, *TINY,
            "--train.global_batch_size", 2, "--train.max_steps", 50, "--train.save_every_steps", 0]  # fmt: skip


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
def test_its_line_stands_in_stderr_and_nobody_stays(
    launcher: Callable[..., list[str]], damaged: tuple[Path, str], tmp_path: Path
) -> None:
    shards, key = damaged
    errors = tmp_path / "stderr"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            launcher(*training(shards, tmp_path / "run")), cwd=ROOT, env=environment(), stderr=file, stdout=file
        )
        try:
            deadline = time.monotonic() + 200
            while not NAMED.search(errors.read_text()):
                assert process.poll() is None or NAMED.search(errors.read_text()), errors.read_text()[-3000:]
                assert time.monotonic() < deadline, errors.read_text()[-3000:]
                time.sleep(0.1)
            code = process.wait(timeout=40)  # from when it is heard to when all is over
            assert not processes_of(tmp_path)
        finally:
            for left in [process, *processes_of(tmp_path)]:
                left.kill()
            process.wait()
    assert code != 0
    assert NAMED.findall(errors.read_text()) == [("1", key)]  # once, and no other rank says it
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in a for a in p.info["cmdline"] or ())]
