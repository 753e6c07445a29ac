"""Addresses, and downloads from a real server that drops, cuts, delays, lies and is busy."""

import base64
import io
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mellow_ds.data import remote
from mellow_ds.data.remote import FsspecFolder, HttpFolder, Retries, Wanted, download, open_address
from mellow_ds.errors import ConfigError, FaultError, MellowError, ShardError
from tests.data.bad_server import Answer, BadServer, cut, delay, drop, longer, status, trickle, without_ranges, wrong

QUICK = Retries(attempts=4, first_seconds=0.01, max_seconds=0.02, connect_seconds=2, silence_seconds=10)
IMPATIENT = replace(QUICK, silence_seconds=1.0)  # with a line that falls silent
NAME = "shard-000000.tar"
CONTENT = np.random.default_rng(0).bytes(3_000_000)
WANTED = Wanted(sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BadServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    made = BadServer(folder)
    yield made
    made.close()


def fetch(server: BadServer, wanted: Wanted = WANTED, before: bytes = b"", retries: Retries = QUICK) -> bytes:
    """What a download ends with, in a file that held `before`."""
    file = io.BytesIO(before)
    download(open_address(server.address, retries), NAME, file, wanted, retries)
    return file.getvalue()


def starts(server: BadServer) -> list[int]:
    return [start for _, start in server.asked]


def test_a_file_comes_whole(server: BadServer) -> None:
    assert fetch(server) == CONTENT
    assert fetch(server, Wanted()) == CONTENT
    assert starts(server) == [0, 0]


@pytest.mark.parametrize(
    ("fault", "resumes"),
    [
        (drop(1_000_000), True),
        (drop(0), False),
        (cut(1_000_000, admitted=False), True),
        (cut(1_000_000, admitted=True), True),
        (status(503), False),
        (status(500), False),
        (status(429, Retry_After="0"), False),
        (wrong, False),
        (longer, False),
    ],
)
def test_each_fault_is_survived(server: BadServer, fault: Answer, resumes: bool) -> None:
    assert_survived(server, fault, resumes, QUICK)


@pytest.mark.parametrize(
    ("fault", "resumes"), [(delay(5.0, after=500_000), True), (delay(5.0), False), (trickle, True)]
)
def test_silence_is_survived(server: BadServer, fault: Answer, resumes: bool) -> None:
    assert_survived(server, fault, resumes, IMPATIENT)


def assert_survived(server: BadServer, fault: Answer, resumes: bool, retries: Retries) -> None:
    server.faults[NAME] = [fault, fault]
    assert fetch(server, retries=retries) == CONTENT
    assert len(server.asked) == 3
    assert (max(starts(server)) > 0) == resumes


def test_what_an_earlier_download_left_is_gone_on_with(server: BadServer) -> None:
    assert fetch(server, before=CONTENT[:777_777]) == CONTENT
    assert fetch(server, before=CONTENT) == CONTENT
    assert starts(server) == [777_777]


@pytest.mark.parametrize("before", [b"other bytes", CONTENT[::-1], CONTENT + b"more"])
def test_what_an_earlier_download_left_may_be_wrong(server: BadServer, before: bytes) -> None:
    assert fetch(server, before=before) == CONTENT
    assert starts(server)[-1] == 0


def test_a_server_that_cannot_skip_sends_it_all_again(server: BadServer) -> None:
    server.faults[NAME] = [drop(1_000_000), without_ranges]
    assert fetch(server) == CONTENT
    assert starts(server) == [0, 1_000_000]


def test_a_line_that_drops_for_ever_but_brings_something_each_time_is_enough(server: BadServer) -> None:
    server.always[NAME] = drop(remote._PROGRESS_BYTES)
    assert fetch(server, retries=Retries(2, 0.0, 0.0)) == CONTENT
    server.always[NAME] = drop(10)  # and one that brings next to nothing is not
    with pytest.raises(FaultError, match="could not be fetched in 4 attempts"):
        fetch(server)


@pytest.mark.parametrize(
    ("fault", "error", "named"),
    [
        (status(404), ShardError, "answers 404 .not found"),
        (status(403), ShardError, "answers 403 .forbidden"),
        (status(401), ShardError, "answers 401"),
        (status(418), ShardError, "answers 418"),
        (status(503), FaultError, "in 4 attempts, the last: the server answers 503"),
        (drop(0), FaultError, "in 4 attempts"),
        (delay(60.0), FaultError, "[Rr]ead timed out"),
        (wrong, ShardError, "SHA-256 differs, 3 times"),
        (longer, ShardError, "more than 3000000 bytes, 3 times"),
    ],
)
def test_what_stays_wrong_ends_in_one_line_that_names_the_address(
    server: BadServer, fault: object, error: type[MellowError], named: str
) -> None:
    server.always[NAME] = fault
    started = time.monotonic()
    with pytest.raises(error, match=named) as caught:
        fetch(server, retries=IMPATIENT if "timed out" in named else QUICK)
    assert time.monotonic() - started < 30
    assert type(caught.value) is error
    assert f"{server.address}/{NAME}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) <= 4


def test_a_file_that_is_shorter_than_the_manifest_says_ends_too(server: BadServer) -> None:
    with pytest.raises(ShardError, match="not the file that the manifest names"):
        fetch(server, Wanted(WANTED.sha256, len(CONTENT) + 5), retries=Retries(6, 0.0, 0.0))


def test_a_missing_file_and_a_missing_server_are_named(server: BadServer) -> None:
    (server.folder / NAME).unlink()
    with pytest.raises(ShardError, match=f"{server.address}/{NAME} cannot be read: the server answers 404"):
        fetch(server)
    server.close()
    with pytest.raises(FaultError, match=r"in 4 attempts, the last: .*(refused|closed)"):
        fetch(server)


def test_waits_double_are_drawn_and_obey_the_server(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    retries = Retries(first_seconds=1.0, max_seconds=10.0)
    for failure, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (50, 10)):
        drawn = [retries.seconds_after(failure) for _ in range(200)]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert len(set(drawn)) > 100
    assert retries.seconds_after(1, asked=60.0) == 60.0
    assert retries.seconds_after(1, asked=1e9) == 120.0
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: waited.append(seconds) if seconds > 1 else None)
    server.faults[NAME] = [status(503, Retry_After="7"), status(429, Retry_After="Wed, 01 Jan 2020 00:00:00 GMT")]
    assert fetch(server) == CONTENT
    assert waited == [7.0]


def test_a_full_disk_is_no_fault_of_the_network(server: BadServer) -> None:
    class Full(io.BytesIO):
        def write(self, block: object) -> int:
            return os.write(full, block)

    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        download(open_address(server.address, QUICK), NAME, Full(), WANTED, QUICK)
    os.close(full)
    assert len(server.asked) == 1


def test_secrets_are_sent_and_never_shown(server: BadServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mellow_ds")
    address = server.address.replace("//", "//me:pass%20word@") + "/?signature=secret"
    folder = open_address(address, QUICK)
    server.always[NAME] = status(503)
    with pytest.raises(FaultError) as caught:
        download(folder, NAME, io.BytesIO(), WANTED, QUICK)
    assert not {"word", "secret"} & set(f"{caught.value} {caplog.text}".replace("=", " ").split())
    assert server.paths[0] == f"/some/shards/{NAME}?signature=secret"
    sent = server.headers[0]["authorization" if "authorization" in server.headers[0] else "Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"me:pass word"


def test_a_redirection_is_followed(server: BadServer) -> None:
    server.faults[NAME] = [status(302, Location=f"{server.address}/{NAME}")]
    assert fetch(server) == CONTENT


def test_the_environment_names_the_proxy(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address.partition("/some")[0])
    monkeypatch.setenv("no_proxy", "")
    file = io.BytesIO()
    download(open_address("http://far.away.invalid/shards", QUICK), NAME, file, WANTED, QUICK)
    assert file.getvalue() == CONTENT
    assert server.paths == [f"http://far.away.invalid/shards/{NAME}"]


def test_a_folder_travels_to_another_process(server: BadServer) -> None:
    folder = open_address(server.address, QUICK)
    download(folder, NAME, io.BytesIO(), WANTED, QUICK)
    file = io.BytesIO()
    download(pickle.loads(pickle.dumps(folder)), NAME, file, WANTED, QUICK)  # noqa: S301 (our own object)
    assert file.getvalue() == CONTENT


def test_no_thread_is_left_behind(server: BadServer) -> None:
    before = {thread.name for thread in threading.enumerate()}
    fetch(server)
    new = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in new if "process_request" not in name}  # the server's own


@pytest.fixture
def memory() -> Iterator[str]:
    """The address of a folder in fsspec's memory."""
    driver = fsspec.filesystem("memory")
    driver.pipe_file(f"/bucket/shards/{NAME}", CONTENT)
    yield "memory://bucket/shards"
    driver.rm("/bucket", recursive=True)


def test_a_driver_of_fsspec_serves_in_ranges(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RANGE_BYTES", 999_999)
    for before in (b"", CONTENT[:5], CONTENT[:-1], CONTENT + b"x"):
        file = io.BytesIO(before)
        download(open_address(memory), NAME, file, WANTED, QUICK)
        assert file.getvalue() == CONTENT
    with pytest.raises(ShardError, match="memory://bucket/shards/other is not there"):
        download(open_address(memory), "other", io.BytesIO(), WANTED, QUICK)


def test_a_driver_that_fails_is_tried_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(fsspec.filesystem("memory"))
    whole, calls = kind.cat_file, []

    def failing(self: object, path: str, start: int, end: int) -> bytes:
        calls.append(start)
        if len(calls) < 3:
            raise RuntimeError("the bucket\nis shy")
        return whole(self, path, start=start, end=end)

    monkeypatch.setattr(kind, "cat_file", failing)
    file = io.BytesIO()
    download(open_address(memory), NAME, file, WANTED, QUICK)
    assert file.getvalue() == CONTENT
    calls[:] = [0] * -99
    monkeypatch.setattr(kind, "cat_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the bucket\nis shy")))
    with pytest.raises(FaultError, match="the last: RuntimeError: the bucket;"):
        download(open_address(memory), NAME, io.BytesIO(), WANTED, QUICK)


def test_what_an_address_names(tmp_path: Path) -> None:
    assert open_address("some/folder") == Path("some/folder")
    assert open_address(tmp_path) == tmp_path
    assert open_address(f"file://{tmp_path}") == tmp_path
    assert open_address(f"FILE://localhost{tmp_path}") == tmp_path
    assert open_address("file:///a%20b") == Path("/a b")
    odd = tmp_path / "$(touch marker); x|y"
    odd.mkdir()
    assert open_address(odd) == odd  # a folder may be called anything
    assert isinstance(open_address("https://host/path/"), HttpFolder)
    assert open_address("HTTPS://me:word@host:8443/path//?a=b&c=d").where("x") == "https://host:8443/path/x"
    assert isinstance(open_address("memory://bucket/path"), FsspecFolder)


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat {marker}",
        " PIPE: touch {marker}",
        "pipe://touch {marker}",
        "https://host/x; touch {marker}",
        "https://host/$(touch {marker})",
        "https://host/x|touch",
        "https://host/x&touch",
        "https://host/`touch`",
        "https://host/x\ntouch",
        "https://host/?a='b'",
        "s3://bucket/x && touch {marker}",
        "memory://x;touch {marker}",
        "x; touch {marker}",
        "$(touch {marker})",
        "cat x | touch {marker}",
        "true && touch {marker}",
        "simplecache::https://host/x",
        "zip://x::https://host/y",
        "reference://x",
        "dask://x/y",
        "nowhere://x/y",
        "https://",
        "https:///",
    ],
)
def test_commands_and_what_is_no_address_are_refused_by_name(text: str, tmp_path: Path) -> None:
    text = text.format(marker=tmp_path / "marker")
    with pytest.raises(ConfigError, match=r"data\.shards names") as caught:
        open_address(text)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "package"), [("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs"), ("sftp://host/x", "paramiko")]
)
def test_a_missing_driver_is_named_as_pip_knows_it(address: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("not installed", name=package)

    monkeypatch.setattr(remote, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=f"{address}, which needs the package {package}: pip install {package}"):
        open_address(address)


def test_without_its_driver_s3_is_one_clear_line() -> None:
    """The real thing, where s3fs is not installed, as here."""
    try:
        assert open_address("s3://bucket/x")
    except ConfigError as error:
        assert str(error) == "data.shards names s3://bucket/x, which needs the package s3fs: pip install s3fs"  # noqa: PT017
