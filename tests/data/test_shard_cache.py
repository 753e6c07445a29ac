"""The cache's bound, its locks and its parts, with real processes that are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mellow_ds.data import shard_cache
from mellow_ds.data.shard_cache import CacheEntry, ShardCache, default_cache_folder
from mellow_ds.errors import ConfigError, FaultError

KB = 1000


def entry(number: int, num_bytes: int = 100 * KB) -> CacheEntry:
    return CacheEntry("key", f"shard-{number:06d}.tar", num_bytes)


def filler(letter: bytes = b"x", num_bytes: int = 100 * KB) -> Callable[[BinaryIO], None]:
    def fill(file: BinaryIO) -> None:
        file.seek(0, os.SEEK_END)
        file.write(letter * (num_bytes - file.tell()))

    return fill


def never(_: BinaryIO) -> None:
    pytest.fail("it is there already")


def age(cache: ShardCache, number: int, seconds: float) -> None:
    """Make a file used so long ago."""
    when = time.time() - seconds
    os.utime(cache.path(entry(number)), (when, when))


def names(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "key").iterdir())


def used(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_then_there(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    assert not cache.holds(entry(0))
    for fetch in (filler(), never):
        descriptor = cache.open(entry(0), fetch)
        assert os.pread(descriptor, 200 * KB, 0) == b"x" * 100 * KB
        os.close(descriptor)
    assert cache.holds(entry(0))
    assert names(cache) == ["shard-000000.tar"]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 350 * KB)
    for number in range(3):
        os.close(cache.open(entry(number), filler()))
        age(cache, number, 100 - number)
    os.close(cache.open(entry(0), never))  # used now
    os.close(cache.open(entry(3), filler()))
    assert names(cache) == [f"shard-00000{number}.tar" for number in (0, 2, 3)]
    assert cache.holds(entry(2))  # and so is this
    os.close(cache.open(entry(4, 250 * KB), filler(num_bytes=250 * KB)))
    assert used(cache) <= 350 * KB
    assert "shard-000004.tar" in names(cache)


def test_what_is_read_goes_last_and_stays_readable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ShardCache(tmp_path, 250 * KB)
    reading = cache.open(entry(0), filler(b"a"))
    age(cache, 0, 1000)
    os.close(cache.open(entry(1), filler()))
    os.close(cache.open(entry(2), filler()))
    assert names(cache) == ["shard-000000.tar", "shard-000002.tar"]
    both = [reading, cache.open(entry(2), never)]
    assert not caplog.records
    os.close(cache.open(entry(3), filler()))
    assert names(cache) == ["shard-000002.tar", "shard-000003.tar"]
    assert "raise it" in caplog.text
    assert os.pread(reading, 3, 99 * KB) == b"aaa"
    for descriptor in both:
        os.close(descriptor)


def test_another_manifest_makes_room_too_and_its_empty_folder_goes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 150 * KB)
    old = CacheEntry("old", "shard-000000.tar", 100 * KB)
    os.close(cache.open(old, filler()))
    os.close(cache.open(entry(0), filler()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "key"]


def test_a_file_that_can_never_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.cache_gigabytes is 5e-05, but shard-000000\.tar alone has 0\.0001 GB"):
        ShardCache(tmp_path, 50 * KB).open(entry(0), never)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    os.close(cache.open(entry(0), filler()))
    os.truncate(cache.path(entry(0)), 99 * KB)
    assert not cache.holds(entry(0))
    os.close(cache.open(entry(0), filler()))
    assert cache.path(entry(0)).stat().st_size == 100 * KB


def test_a_discarded_file_is_gone_but_not_the_one_that_took_its_place(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    first = cache.open(entry(0), filler())
    cache.discard(entry(0), first)
    second = cache.open(entry(0), filler())
    cache.discard(entry(0), first)
    assert cache.holds(entry(0))
    os.close(first)
    os.close(second)


def test_a_failed_download_leaves_its_part_and_no_lock(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)

    def fail(file: BinaryIO) -> None:
        file.write(b"x" * 40 * KB)
        raise FaultError("the network is gone")

    with pytest.raises(FaultError, match="is gone"):
        cache.open(entry(0), fail)
    assert names(cache) == ["shard-000000.tar.100000.part"]
    found: list[int] = []
    os.close(cache.open(entry(0), lambda file: (found.append(len(file.read())), filler()(file))[1]))
    assert found == [40 * KB]
    assert names(cache) == ["shard-000000.tar"]


def test_a_part_that_nobody_goes_on_with_makes_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 250 * KB)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "shard-000009.tar.200000.part").write_bytes(b"x")
    os.close(cache.open(entry(0), filler()))
    assert names(cache) == ["shard-000000.tar"]


def test_a_full_or_forbidden_disk_is_one_line(tmp_path: Path) -> None:
    def fill(_: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    cache = ShardCache(tmp_path / "c")
    with pytest.raises(FaultError, match=r"data.cache_folder .* is full"):
        cache.open(entry(0), fill)
    assert names(cache) == []
    (tmp_path / "file").touch()
    with pytest.raises((ConfigError, FaultError), match=r"data\.cache_folder"):
        ShardCache(tmp_path / "file" / "below").open(entry(0), never)


def test_threads_share_a_download(tmp_path: Path) -> None:
    cache, fetched = ShardCache(tmp_path), []

    def slowly(file: BinaryIO) -> None:
        fetched.append(threading.get_ident())
        time.sleep(0.2)
        filler()(file)

    threads = [threading.Thread(target=lambda: os.close(cache.open(entry(0), slowly))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(fetched) == 1
    assert not any(thread.is_alive() for thread in threads)


def test_who_waits_reads_what_another_has_brought_and_still_reads(tmp_path: Path) -> None:
    """The other keeps its lock, as a loader process does that reads one shard after another."""
    cache, found, is_fetching = ShardCache(tmp_path), [], threading.Event()

    def slowly(file: BinaryIO) -> None:
        is_fetching.set()
        time.sleep(0.5)  # the second has opened the part by then
        filler()(file)

    def wait() -> None:
        assert is_fetching.wait(60)
        found.append(cache.open(entry(0), never))

    second = threading.Thread(target=wait, daemon=True)
    second.start()
    first = cache.open(entry(0), slowly)
    second.join(timeout=60)
    assert found, "it waits for a lock that the first holds for as long as it reads"
    assert os.pread(found[0], 200 * KB, 0) == b"x" * 100 * KB
    for descriptor in (first, *found):
        os.close(descriptor)


def test_a_file_is_published_when_nobody_makes_room(tmp_path: Path) -> None:
    """Who makes room lists the folder and then asks for sizes: a file renamed in between would not be counted."""
    cache = ShardCache(tmp_path)
    thread = threading.Thread(target=lambda: os.close(cache.open(entry(0), filler())), daemon=True)
    with cache._lock():
        thread.start()
        deadline = time.monotonic() + 60
        while used(cache) < 100 * KB:  # until it has come, and a moment more
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        assert names(cache) == ["shard-000000.tar.100000.part"]
    thread.join(timeout=60)
    assert names(cache) == ["shard-000000.tar"]


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MELLOW_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "mellow-ds" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_folder() == tmp_path / "x" / "mellow-ds" / "shards"
    monkeypatch.setenv("MELLOW_CACHE", str(tmp_path / "m"))
    assert ShardCache().folder == tmp_path / "m" / "shards"


DOWNLOADER = """
import os, sys, time
from mellow_ds.data.shard_cache import CacheEntry, ShardCache
def fetch(file):
    held = len(file.read())
    print("starts", held, flush=True)
    while held < 100_000:
        held += file.write(b"y" * 10_000)
        print("has", held, flush=True)
        time.sleep({pause})
os.close(ShardCache(sys.argv[1]).open(CacheEntry("key", "shard-000000.tar", 100_000), fetch))
print("done", flush=True)
"""


def start(folder: Path, pause: float) -> subprocess.Popen:
    code = DOWNLOADER.format(pause=pause)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)


def test_who_waits_goes_on_where_a_killed_downloader_stopped(tmp_path: Path) -> None:
    first = start(tmp_path, 60)
    assert first.stdout is not None
    assert [first.stdout.readline().strip() for _ in range(2)] == ["starts 0", "has 10000"]
    second = start(tmp_path, 0)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.0)  # it waits for the first
    first.kill()
    out, _ = second.communicate(timeout=60)
    assert out.split("\n")[0] == "starts 10000"
    assert out.split()[-1] == "done"
    first.wait(60)
    first.stdout.close()
    assert names(ShardCache(tmp_path)) == ["shard-000000.tar"]


def test_a_downloader_that_stands_still_is_named_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, 60)
    assert first.stdout is not None
    first.stdout.readline()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(shard_cache, "_MAX_STALL_SECONDS", 0.2)
        with pytest.raises(FaultError, match=r"another process downloads .*shard-000000\.tar.*has brought nothing"):
            ShardCache(tmp_path).open(entry(0), never)
    finally:
        first.kill()
        first.wait(60)
        first.stdout.close()


MANY = """
import os, random, sys, time
from mellow_ds.data.shard_cache import CacheEntry, ShardCache
cache, draw = ShardCache(sys.argv[1], 1_000_000), random.Random(int(sys.argv[2]))
end = time.monotonic() + float(sys.argv[3])
held = []
while time.monotonic() < end:
    number = draw.randrange(30)
    def fetch(file):
        size = len(file.read())
        while size < 100_000:
            size += file.write(bytes([number]) * min(25_000, 100_000 - size))
            time.sleep(0.001)
    held.append((number, cache.open(CacheEntry("key", f"shard-{number:06d}.tar", 100_000), fetch)))
    if len(held) > 2:
        held.pop(0)
    for number, descriptor in held:
        content = os.pread(descriptor, 200_000, 0)
        assert content == bytes([number]) * 100_000, (number, len(content))
    if len(held) > 1:
        os.close(held.pop(0)[1])
print("done")
"""


@pytest.mark.slow
def test_the_bound_holds_with_several_processes_some_of_which_are_killed(tmp_path: Path) -> None:
    def run(number: int, seconds: float) -> subprocess.Popen[Any]:
        command = [sys.executable, "-c", MANY, str(tmp_path), str(number), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [run(number, 3.0) for number in range(3)]
    doomed = [run(number, 60.0) for number in range(3, 6)]
    most = 0
    deadline = time.monotonic() + 30
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        if doomed and time.monotonic() > deadline - 28.5 + 0.4 * (3 - len(doomed)):
            doomed.pop().kill()
        sizes = []
        for path in tmp_path.rglob("shard*"):
            try:
                sizes.append(100_000 if path.name.endswith(".part") else path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.003)
    for process in doomed:
        process.kill()
    for process in processes:
        out, errors = process.communicate()
        assert (out, process.returncode) == ("done\n", 0), errors
    # a scan while files come and go may see a file before and another after a change: one more of each process
    assert 900_000 <= most <= 1_000_000 + 6 * 100_000
    assert used(ShardCache(tmp_path)) <= 1_000_000
