"""A tiny corpus of sounds, packed, for runs of the real commands."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.runs import ROOT, environment


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train` and `test` shards of 16 and 6 short sounds."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    folder = tmp_path_factory.mktemp("corpus")
    synthesize(folder / "corpus", {"train": 16, "test": 6}, seed=3, audio_format="wav", workers=1)
    for split in ("train", "test"):
        build_shards([folder / "corpus" / f"{split}.json"], folder / "corpus", folder / split)
    return folder


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the project as a process, with a deadline; its output is text."""

    def run(*arguments: object, seconds: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=seconds, cwd=ROOT,
            env=environment(**env), check=False,
        )  # fmt: skip

    return run
