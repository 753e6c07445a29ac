"""Hosts for a test, and a tiny corpus that a run on them trains on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, hosts_up, why_not


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16 short sounds."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    folder = tmp_path_factory.mktemp("corpus")
    synthesize(folder / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
    build_shards([folder / "corpus" / "train.json"], folder / "corpus", folder / "train")
    return folder / "train"
