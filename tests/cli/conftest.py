"""A tiny corpus of sounds, packed, and a run on it that nothing disturbed."""

from pathlib import Path

import pytest

from tests.cli.runs import TINY, by_deepspeed, launched


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train` and `test` shards of 16 and 6 short sounds, and the corpus that they were packed from."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    folder = tmp_path_factory.mktemp("corpus")
    synthesize(folder / "corpus", {"train": 16, "test": 6}, seed=3, audio_format="wav", workers=1)
    for split in ("train", "test"):
        build_shards([folder / "corpus" / f"{split}.json"], folder / "corpus", folder / split)
    return folder


@pytest.fixture(scope="session")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two ranks by DeepSpeed's launcher, ZeRO-2, that nothing disturbed. Copy it to change it."""
    run = tmp_path_factory.mktemp("straight")
    result = launched(
        by_deepspeed("--config", "quickstart", "--deepspeed_config", "ds_configs/zero2.json",
                     "--data.shards", shards / "train", "--save-dir", run, *TINY)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return run
