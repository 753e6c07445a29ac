"""A reader over remote folders: as over local ones, each file asked for once a node, whatever happens on the way."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mellow_ds.config.schema import DataConfig
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data import reader as reader_module
from mellow_ds.data.reader import BadSampleError, ShardReader
from mellow_ds.data.remote import Retries
from mellow_ds.errors import ConfigError, FaultError, ShardError
from mellow_ds.shard_format import MANIFEST_NAME, read_manifest
from tests.data.bad_server import BadServer, cut, delay, drop, paced, status, well, wrong
from tests.data.made_shards import RATE, CharTokenizer, make_layout, simple_clips, write_shards

QUICK = Retries(attempts=4, first_seconds=0.01, max_seconds=0.02, connect_seconds=2, silence_seconds=10)
TARS = [f"shard-{number:06d}.tar" for number in range(3)]
INDEXES = [name.replace(".tar", ".index.npy") for name in TARS]


@pytest.fixture
def server(shards: Path) -> Iterator[BadServer]:
    made = BadServer(shards)
    yield made
    made.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_reader(address: Any, cache: Path, gigabytes: float = 1.0, retries: Retries = QUICK) -> ShardReader:
    return ShardReader([address], RATE, cache, gigabytes, retries)


def everything(reader: ShardReader) -> list[tuple[bytes, bytes]]:
    """Audio and JSON of every sample."""
    found = []
    for shard in range(len(reader.shards)):
        for row in range(reader.num_samples(shard)):
            sample = reader.sample(shard, row)
            found.append((bytes(sample.audio), bytes(sample.text)))
    return found


def cached(cache: Path, name: str) -> Path:
    (found,) = cache.glob(f"*/{name}")
    return found


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def counts(server: BadServer, names: list[str]) -> list[int]:
    return [server.count(name) for name in names]


def test_a_remote_folder_reads_as_the_local_one_and_each_file_comes_once(
    server: BadServer, cache: Path, shards: Path
) -> None:
    local = ShardReader([shards], RATE)
    for _ in range(2):
        reader = open_reader(server.address, cache)
        assert everything(reader) == everything(local)
        assert (reader.fingerprint, reader.num_questions, reader.subtypes) == (
            local.fingerprint,
            local.num_questions,
            local.subtypes,
        )
        assert [reader.locate(1, number) for number in range(14)] == [local.locate(1, number) for number in range(14)]
        assert list(reader.infos(2)) == list(local.infos(2))
        assert str(reader.sample(0, 1).place).startswith(f"{server.address}/shard-000000.tar, sample ")
    assert counts(server, [MANIFEST_NAME, *INDEXES, *TARS]) == [2, 1, 1, 1, 1, 1, 1]


def test_nothing_but_the_manifest_is_fetched_before_it_is_needed(server: BadServer, cache: Path) -> None:
    reader = open_reader(server.address, cache)
    assert [name for name, _ in server.asked] == [MANIFEST_NAME]
    reader.locate(1, 0)
    assert counts(server, [*INDEXES, *TARS]) == [0, 1, 0, 0, 0, 0]
    reader.sample(1, 0)
    assert counts(server, [*INDEXES, *TARS]) == [0, 1, 0, 0, 1, 0]


def test_local_and_remote_folders_stand_in_one_list(server: BadServer, cache: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [simple_clips(7, 3)])
    reader = ShardReader([str(other), server.address, f"file://{other}"], RATE, cache, 1.0, QUICK)
    assert len(everything(reader)) == 3 + 21 + 3
    assert reader.sample(0, 1).info == reader.sample(4, 1).info
    assert reader.fingerprint == ShardReader([other, server.folder, other], RATE).fingerprint


def test_faults_on_the_way_are_survived(server: BadServer, cache: Path, shards: Path) -> None:
    server.faults[MANIFEST_NAME] = [status(503), cut(100, admitted=True), cut(100, admitted=False), drop(50)]
    server.faults[INDEXES[0]] = [wrong, status(503), status(503)]
    server.faults[INDEXES[1]] = [cut(50, admitted=True)]
    server.faults[TARS[0]] = [drop(1000), status(503), delay(5.0, 100)]
    server.faults[TARS[1]] = [wrong, cut(5000, admitted=True), cut(5000, admitted=False)]
    reader = open_reader(server.address, cache, retries=dataclasses.replace(QUICK, silence_seconds=1.0))
    assert everything(reader) == everything(ShardReader([shards], RATE))
    assert not any(server.faults.values())
    assert not list(cache.glob("*/*.part"))


@pytest.mark.parametrize(
    ("name", "answer", "error", "named"),
    [
        (MANIFEST_NAME, status(404), ShardError, r"shards/manifest\.json cannot be read: the server answers 404"),
        (
            MANIFEST_NAME,
            cut(100, admitted=True),
            ShardError,
            r"shards/manifest\.json cannot be read .*build the shards",
        ),
        (INDEXES[1], status(404), ShardError, r"shards/shard-000001\.index\.npy cannot be read: .*404"),
        (TARS[1], wrong, ShardError, r"shards/shard-000001\.tar is not the file that the manifest names"),
        (TARS[1], status(503), FaultError, r"shards/shard-000001\.tar could not be fetched in 4 attempts.*503"),
    ],
)
def test_what_stays_wrong_is_one_line_with_the_address(
    server: BadServer, cache: Path, name: str, answer: Any, error: type[Exception], named: str
) -> None:
    server.always[name] = answer
    with pytest.raises(error, match=f"http://127.0.0.1:.*{named}") as caught:
        everything(open_reader(server.address, cache))
    assert "\n" not in str(caught.value)
    assert str(cache) not in str(caught.value)


def test_a_server_that_is_not_there_and_a_wrong_rate_are_named(server: BadServer, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"http://.* was packed at 8000 Hz"):
        ShardReader([server.address], 32_000, cache)
    server.close()
    with pytest.raises(FaultError, match=r"manifest\.json could not be fetched"):
        open_reader(server.address, cache)


@pytest.mark.parametrize("offset", [0, 700, -1])
def test_a_tar_that_was_damaged_in_the_cache_is_fetched_again_once(
    server: BadServer, cache: Path, shards: Path, offset: int
) -> None:
    everything(open_reader(server.address, cache))
    row = np.load(shards / INDEXES[0])[4]
    flip(cached(cache, TARS[0]), int(row["audio_offset"]) + offset if offset >= 0 else offset)
    reader = open_reader(server.address, cache)
    assert everything(reader) == everything(ShardReader([shards], RATE))
    # a byte that belongs to no sample harms nobody
    assert counts(server, TARS) == [1 if offset == -1 else 2, 1, 1]


def test_a_tar_and_an_index_that_were_cut_in_the_cache_are_fetched_again(
    server: BadServer, cache: Path, shards: Path
) -> None:
    everything(open_reader(server.address, cache))
    os.truncate(cached(cache, TARS[0]), 2000)
    os.truncate(cached(cache, INDEXES[0]), 200)
    flip(cached(cache, INDEXES[1]), -3)
    reader = open_reader(server.address, cache)
    assert everything(reader) == everything(ShardReader([shards], RATE))
    assert counts(server, [*INDEXES, *TARS]) == [2, 2, 1, 2, 1, 1]


def test_a_tar_that_is_cut_in_the_cache_while_it_is_read_is_fetched_again(server: BadServer, cache: Path) -> None:
    reader = open_reader(server.address, cache)
    before = everything(reader)
    os.truncate(cached(cache, TARS[0]), 2000)
    assert everything(reader) == before
    assert counts(server, TARS) == [2, 1, 1]


def test_a_sample_that_was_bad_when_it_was_uploaded_is_not_fetched_for_ever(
    server: BadServer, cache: Path, shards: Path
) -> None:
    for row in np.load(shards / INDEXES[0])[2:4]:
        flip(shards / TARS[0], int(row["audio_offset"]) + 40)
    infos = [dataclasses.asdict(shard) for shard in read_manifest(shards).shards]
    infos[0]["sha256"] = hashlib.sha256((shards / TARS[0]).read_bytes()).hexdigest()
    manifest = shards / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": infos}))
    reader = open_reader(server.address, cache)
    for row in (2, 3, 2):
        with pytest.raises(BadSampleError, match="checksum"):
            reader.sample(0, row)
    reader.sample(0, 1)
    assert counts(server, TARS) == [1, 0, 0]


def test_a_shard_that_is_replaced_on_the_server_is_noticed(server: BadServer, cache: Path, tmp_path: Path) -> None:
    reader = open_reader(server.address, cache)
    reader.sample(0, 0)
    old = reader.fingerprint
    other = write_shards(tmp_path / "other", [simple_clips(n + 5, clips) for n, clips in enumerate((10, 7, 4))])
    for path in other.iterdir():
        shutil.copy(path, server.folder)
    reader.sample(0, 1)  # it is here
    with pytest.raises(ShardError, match=r"shard-000001\.index\.npy is not the file that the manifest names"):
        reader.sample(1, 0)
    again = open_reader(server.address, cache)
    assert again.fingerprint != old
    assert everything(again) == everything(ShardReader([other], RATE))  # nothing of the old one is taken


def test_the_cache_stays_within_its_bound(server: BadServer, cache: Path, shards: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    bound = max(sizes) + min(sizes)
    reader = open_reader(server.address, cache, bound / 1e9)
    for _ in range(2):
        everything(reader)
        assert sum(path.stat().st_size for path in cache.rglob("shard*")) <= bound
    assert min(counts(server, TARS)) == 1 < max(counts(server, TARS))
    removed = [path for path in open_paths() if str(cache) in path and "(deleted)" in path]
    assert len(removed) <= 1  # the space of removed files is given back when the next is opened


def test_a_cache_below_one_shard_is_refused_by_name(server: BadServer, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_gigabytes is 1e-06, but http://.*shard-000000\.tar alone has"):
        open_reader(server.address, cache, 1e-6)
    assert open_reader(server.address, cache, 0).num_examples == 42


def open_paths() -> list[str]:
    """What the descriptors of this process are open on."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.append(str(link.readlink()))
    return found


def test_a_file_that_is_no_longer_read_is_closed(
    server: BadServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_reader(server.address, cache)
    reader.sample(0, 0)
    reader.sample(1, 0)
    assert len([path for path in open_paths() if str(cache) in path]) == 2
    monkeypatch.setattr(reader_module, "_IDLE_SECONDS", 0.05)
    time.sleep(0.1)
    old = cached(cache, TARS[1]).stat().st_mtime_ns
    reader.sample(1, 1)  # noted, for all processes
    assert cached(cache, TARS[1]).stat().st_mtime_ns > old
    reader.sample(2, 0)
    assert [path for path in open_paths() if str(cache) in path and TARS[0] in path] == []
    assert len([path for path in open_paths() if str(cache) in path]) == 2


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_shards_come_ahead_in_the_background(server: BadServer, cache: Path) -> None:
    others = set(threading.enumerate())
    may_come = threading.Event()

    def held(handler: Any, content: bytes, start: int) -> None:
        may_come.wait(60)
        well(handler, content, start)

    server.faults[TARS[2]] = [held]
    reader = open_reader(server.address, cache)
    reader.prefetch([2, 0, 2, 0])
    assert not list(cache.glob(f"*/{TARS[2]}"))  # it has not waited
    may_come.set()
    wait_for(lambda: len(list(cache.glob("*/*.tar"))) == 2)
    asked = len(server.asked)
    reader.sample(0, 0), reader.sample(2, 0)
    reader.prefetch([0, 2])
    reader.prefetch([])
    time.sleep(0.1)
    assert len(server.asked) == asked
    reader.sample(1, 0)
    assert counts(server, [*INDEXES, *TARS]) == [1, 1, 1, 1, 1, 1]
    assert set(threading.enumerate()) - others
    reader.close()
    wait_for(lambda: not [thread for thread in set(threading.enumerate()) - others if thread.name == "fetch-ahead"])
    reader.prefetch([0])
    reader.close()


def test_a_shard_that_is_on_its_way_is_waited_for(server: BadServer, cache: Path) -> None:
    server.faults[TARS[0]] = [delay(0.3, 1000)]
    reader = open_reader(server.address, cache)
    reader.prefetch([0])
    wait_for(lambda: server.count(TARS[0]))
    reader.sample(0, 0)
    assert counts(server, TARS) == [1, 0, 0]


def test_what_went_wrong_ahead_is_raised_when_the_shard_is_read(server: BadServer, cache: Path) -> None:
    server.always[TARS[1]] = status(403)
    reader = open_reader(server.address, cache)
    reader.prefetch([1, 2])
    wait_for(lambda: list(cache.glob(f"*/{TARS[2]}")) and reader._ahead._errors)
    asked = server.count(TARS[1])
    with pytest.raises(ShardError, match=r"shard-000001\.tar cannot be read: the server answers 403"):
        reader.sample(1, 0)
    assert server.count(TARS[1]) == asked == 1
    del server.always[TARS[1]]
    reader.sample(1, 0)  # and then it is tried again


def test_no_more_comes_ahead_than_half_of_the_cache_holds(server: BadServer, cache: Path, shards: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    reader = open_reader(server.address, cache, 2 * (sizes[0] + sizes[1] + 1) / 1e9)
    reader.prefetch([0, 1, 2])
    wait_for(lambda: len(list(cache.glob("*/*.tar"))) == 2)
    time.sleep(0.1)
    assert counts(server, TARS) == [1, 1, 0]


def test_local_shards_are_not_fetched(shards: Path) -> None:
    reader = ShardReader([shards], RATE)
    reader.prefetch(range(3))
    assert reader._ahead is None


def test_a_reader_travels_to_another_process(server: BadServer, cache: Path) -> None:
    reader = open_reader(server.address, cache)
    reader.prefetch([0])
    reader.sample(0, 0)
    copied = pickle.loads(pickle.dumps(reader))  # noqa: S301 (our own object, as loaders get it)
    assert everything(copied) == everything(reader)
    assert server.count(MANIFEST_NAME) == 1


def test_any_store_of_fsspec_does(cache: Path, shards: Path) -> None:
    driver = fsspec.filesystem("memory")
    for path in shards.iterdir():
        driver.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    try:
        reader = open_reader("memory://bucket", cache)
        assert everything(reader) == everything(ShardReader([shards], RATE))
        driver.rm(f"/bucket/{MANIFEST_NAME}")
        with pytest.raises(ShardError, match=r"memory://bucket/manifest\.json is not there"):
            open_reader("memory://bucket", cache)
    finally:
        driver.rm("/bucket", recursive=True)


def test_a_command_in_place_of_an_address_never_runs(cache: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for text in (f"pipe:touch {marker}", f"http://127.0.0.1/$(touch {marker})", f"x; touch {marker}"):
        with pytest.raises(ConfigError, match=r"data\.shards names"):
            open_reader(text, cache)
    assert not marker.exists()


READ_ALL = """
import hashlib, sys
from mellow_ds.data import reader as reader_module
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.remote import Retries
reader = ShardReader([sys.argv[1]], 8000, sys.argv[2], 1.0, Retries(4, 0.01, 0.02))
print("ready", flush=True)
digest = hashlib.sha256()
for shard in range(len(reader.shards)):
    for row in range(reader.num_samples(shard)):
        sample = reader.sample(shard, row)
        digest.update(sample.audio)
        digest.update(sample.text)
print(digest.hexdigest())
"""


def start(server: BadServer, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ_ALL, server.address, str(cache)], stdout=subprocess.PIPE, text=True
    )


def expected(shards: Path) -> str:
    return hashlib.sha256(b"".join(a + t for a, t in everything(ShardReader([shards], RATE)))).hexdigest()


@pytest.mark.slow
def test_processes_share_a_download(server: BadServer, cache: Path, shards: Path) -> None:
    for name in TARS:
        server.faults[name] = [paced(5, 0.5)]
    processes = [start(server, cache) for _ in range(3)]
    outs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert outs == [["ready", expected(shards)]] * 3
    assert counts(server, [*INDEXES, *TARS]) == [1] * 6


@pytest.mark.slow
def test_when_the_downloader_is_killed_another_goes_on(server: BadServer, cache: Path, shards: Path) -> None:
    size = (shards / TARS[0]).stat().st_size
    server.faults[TARS[0]] = [paced(10, 60.0)]
    first = start(server, cache)
    wait_for(lambda: list(cache.glob("*/*.tar.*.part")) and next(cache.glob("*/*.tar.*.part")).stat().st_size, 60)
    second = start(server, cache)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.0)
    assert server.count(TARS[0]) == 1  # it waits for the first
    first.kill()
    assert second.communicate(timeout=60)[0].split()[-1] == expected(shards)
    assert [0 < start < size for name, start in server.asked if name == TARS[0]] == [False, True]
    first.communicate()


@pytest.mark.slow
def test_a_stream_with_loader_processes_reads_remote_shards(server: BadServer, cache: Path, shards: Path) -> None:
    from mellow_ds.data.stream import TrainStream
    from mellow_ds.world import World

    data = DataConfig(
        sampling_rate=RATE, segment_seconds=0.05, cache_folder=str(cache), cache_gigabytes=1.0, shards=(server.address,)
    )
    train = TrainConfig(batch_size=3, global_batch_size=10, num_workers=2)
    found = []
    for reader in (ShardReader.from_config(data.shards, data), ShardReader([shards], RATE)):
        with TrainStream(reader, CharTokenizer(), make_layout(), data, train, World(), end_step=6) as stream:
            found.append([batch.example_ids for step in stream for batch in step.micro_batches])
    assert found[0] == found[1]
    assert counts(server, [MANIFEST_NAME, *INDEXES, *TARS]) == [1] * 7
