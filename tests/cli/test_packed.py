"""JSON and a folder of audio in place of shards: packed once into the cache, by one of several processes."""

import dataclasses
import logging
import multiprocessing
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.cli import packed as packed_module
from mellow_ds.cli.packed import check_files, needs_packing, with_packed_shards
from mellow_ds.cli.train import check_inputs
from mellow_ds.cli.train import main as train_main
from mellow_ds.config.schema import DataConfig, RunConfig
from mellow_ds.errors import ConfigError, PackingError
from mellow_ds.shard_format import read_manifest
from mellow_ds.world import World


@pytest.fixture
def corpus(shards: Path) -> Path:
    """The synthesized corpus that the shards of these tests were packed from."""
    return shards / "corpus"


def run_on(corpus: Path, cache: Path, **data: Any) -> RunConfig:
    values = {"datafiles": (str(corpus / "test.json"),), "datapath": str(corpus), "cache_folder": str(cache), **data}
    return RunConfig(data=DataConfig(**values))


def test_shards_are_packed_once_and_named(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mellow_ds")
    config = run_on(corpus, tmp_path)
    assert needs_packing(config)
    packed = with_packed_shards(config, World())
    assert not needs_packing(packed)
    (folder,) = packed.data.shards
    assert any(m.startswith("data.shards is empty: packing data.datafiles first, once, into ") for m in caplog.messages)
    manifest = read_manifest(folder)
    assert manifest.num_clips == 6
    before = (Path(folder) / "manifest.json").stat().st_mtime_ns
    assert with_packed_shards(config, World()) == packed
    assert f"data.shards is empty: data.datafiles are packed already, in {folder}" in caplog.messages
    assert (Path(folder) / "manifest.json").stat().st_mtime_ns == before
    slower = with_packed_shards(run_on(corpus, tmp_path, sampling_rate=16_000), World())
    assert slower.data.shards != packed.data.shards
    assert read_manifest(slower.data.shards[0]).sample_rate == 16_000


def pack_as(rank: int, corpus: Path, cache: Path, found: Any) -> None:
    found.put(with_packed_shards(run_on(corpus, cache), World(rank, 3, rank, local_size=3)).data.shards)


@pytest.mark.slow
def test_ranks_of_a_node_wait_for_the_one_that_packs(corpus: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    ranks = [context.Process(target=pack_as, args=(rank, corpus, tmp_path, found)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len({found.get() for _ in ranks}) == 1


def test_shards_that_are_named_are_not_packed_again(corpus: Path, tmp_path: Path) -> None:
    assert not needs_packing(run_on(corpus, tmp_path, shards=("s",)))
    assert not needs_packing(run_on(corpus, tmp_path, datapath=""))
    evaluated = dataclasses.replace(run_on(corpus, tmp_path, eval_shards=("s",)), mode="evaluate_checkpoint")
    assert not needs_packing(evaluated)
    assert needs_packing(run_on(corpus, tmp_path, eval_shards=("s",)))


def test_scoring_what_is_trained_on_is_said(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(run_on(corpus, tmp_path), mode="evaluate_checkpoint", resume_checkpoint=str(tmp_path))
    check_inputs(config, World())
    assert caplog.messages == [
        "data.eval_shards is empty: what is scored are the examples of data.shards or data.datafiles"
    ]


def test_what_is_missing_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.datafiles names \S+none\.json, which is not there"):
        check_files(run_on(corpus, tmp_path, datafiles=(str(corpus / "none.json"),)))
    with pytest.raises(ConfigError, match=r"data\.datapath \S+none is not a folder"):
        check_files(run_on(corpus, tmp_path, datapath=str(corpus / "none")))
    with pytest.raises(PackingError, match="file is missing"):
        with_packed_shards(run_on(corpus, tmp_path, datapath=str(tmp_path)), World())
    arguments = ["--config", "quickstart", "--data.datafiles", "none.json", "--data.datapath", str(corpus)]
    assert train_main(arguments) == 2
    assert "error: data.datafiles names none.json" in capsys.readouterr().err


def test_large_json_is_not_held_in_memory(tmp_path: Path) -> None:
    """To name the folder in the cache it is hashed, a piece at a time."""
    file = tmp_path / "many.json"
    with file.open("wb") as written:
        written.truncate(40_000_000)
    config = RunConfig(data=DataConfig(datafiles=(str(file),), datapath=str(tmp_path)))
    tracemalloc.start()
    try:
        name = packed_module._name(config)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert name.startswith("many-")
    assert most < 20_000_000
    with file.open("ab") as written:
        written.write(b"x")
    assert packed_module._name(config) != name
