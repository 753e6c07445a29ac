"""Hosts for a test, and a tiny corpus that a run on them trains on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.runs import ROOT, environment
from tests.cluster.hosts import Hosts, hosts_up, why_not
from tests.cluster.runs import START_SECONDS, losses, training
from tests.cluster.slurm import Slurm, slurm_up
from tests.cluster.slurm import why_not as why_no_slurm


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A front and two nodes, up; skips where they cannot be made."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path / "hosts-of-the-test"
    folder.mkdir()
    with hosts_up(folder) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster; skips where there can be none."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    with slurm_up(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16 short sounds."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    folder = tmp_path_factory.mktemp("corpus")
    synthesize(folder / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
    build_shards([folder / "corpus" / "train.json"], folder / "corpus", folder / "train")
    return folder / "train"


@pytest.fixture(scope="session")
def losses_of_one_host(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the six steps of `training` on two ranks of this machine: what any start on several hosts must come to."""
    run = tmp_path_factory.mktemp("one-host") / "run"
    here = [sys.executable, "-m", "mellow_ds.cli.main", "launch", "--num-per-host", "2", *training(corpus, run)]
    done = subprocess.run(here, cwd=ROOT, env=environment(), timeout=START_SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(run)
    assert len(found) == 6
    return found
