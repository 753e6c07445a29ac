"""A few synthetic sounds, packed; and no waiting for a hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.doctor.offline import offline


@pytest.fixture(autouse=True)
def _nothing_is_fetched() -> Iterator[None]:
    with offline():
        yield


@pytest.fixture(scope="session")
def few_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of 8 short sounds at 32 kHz."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    folder = tmp_path_factory.mktemp("doctor")
    synthesize(folder / "corpus", {"train": 8}, seed=3, audio_format="wav", workers=1)
    build_shards([folder / "corpus" / "train.json"], folder / "corpus", folder / "shards")
    return folder / "shards"
