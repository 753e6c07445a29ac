"""Files of a remote shard folder: which addresses there are, and a download that survives a bad network.

HTTP(S) goes through urllib3 (plain sockets: nothing of it runs on in a loader process), all else through the drivers of
`fsspec`. No address is ever a command: `pipe:` and shell characters are refused. Where a download is put, and who
shares it, is the business of `shard_cache`.
"""

import hashlib
import logging
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import urllib3
from fsspec.core import url_to_fs
from fsspec.registry import get_filesystem_class, known_implementations

from mellow_ds.errors import ConfigError, FaultError, ShardError

_log = logging.getLogger("mellow_ds.data")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_COMMAND = re.compile(r"\s*pipe\s*:", re.IGNORECASE)
_SHELL_CHARACTERS = re.compile(r"[|;<>`$\\\"'{}()\s\x00-\x1f\x7f]")
# drivers that read through another address, start workers or read a program of their own
_REFUSED_SCHEMES = frozenset(
    [
        "async_wrapper",
        "asynclocal",
        "asyncwrapper",
        "blockcache",
        "cached",
        "dask",
        "data",
        "dir",
        "filecache",
        "generic",
        "jlab",
        "jupyter",
        "libarchive",
        "pipe",
        "pyscript",
        "reference",
        "simplecache",
        "tar",
        "zip",
    ]
)
_LOCAL_SCHEMES = frozenset(("file", "local"))

_BLOCK_BYTES = 256 * 1024  # most that is taken from a socket at once
_RANGE_BYTES = 8 * 1024 * 1024  # of one request through fsspec
_PROGRESS_BYTES = 1024 * 1024  # a connection that brought so many new bytes is no failure
_TRICKLE_BYTES = 16 * 1024  # fewer in Retries.silence_seconds: the connection counts as dead
_MAX_WRONG = 3  # whole files with another hash before the server is believed to have no other
_MAX_RETRY_AFTER = 120.0  # seconds; what a server asks for beyond is not waited for
_MAX_REDIRECTS = 5
_PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_STATUS_NAMES = {401: "not logged in", 403: "forbidden", 404: "not found", 410: "gone"}


@dataclass(frozen=True)
class Retries:
    """How long a download is tried."""

    attempts: int = 8  # failures in a row, without new bytes, before giving up
    first_seconds: float = 0.5  # wait after the first failure; it doubles with each
    max_seconds: float = 30.0  # longest wait that we choose ourselves
    connect_seconds: float = 10.0  # for a connection to stand
    silence_seconds: float = 60.0  # without a byte: the connection counts as dead

    def seconds_after(self, failure: int, asked: float = 0.0) -> float:
        """Wait after failure number `failure` (from 1): doubling, with half of it drawn, and never below `asked`.

        Drawn from the system, not from the run's random numbers: ranks that failed together must not return together.
        """
        longest = min(self.first_seconds * 2 ** (failure - 1), self.max_seconds)
        return max(longest * random.SystemRandom().uniform(0.5, 1.0), min(asked, _MAX_RETRY_AFTER))


DEFAULT_RETRIES = Retries()


@dataclass(frozen=True)
class Wanted:
    """What is known of a file before it is there."""

    sha256: str = ""  # empty: not known
    num_bytes: int = -1  # -1: not known
    max_bytes: int = 2**30  # more is not taken


class RemoteFolder(Protocol):
    """A folder of files that are read in pieces; picklable."""

    def where(self, name: str) -> str:
        """The address of a file for messages, without what is secret in it."""
        ...

    def blocks(self, name: str, start: int) -> Iterator[tuple[int, bytes]]:
        """(place in the file, bytes) from `start` on, or from 0 where the server cannot skip.

        Raises `PassingProblem` for what may go better the next time, `ShardError` for what will not.
        """
        ...


class PassingProblem(Exception):
    """Something that may go better the next time."""

    def __init__(self, problem: str, seconds: float = 0.0, restart: bool = False) -> None:
        super().__init__(problem)
        self.seconds = seconds  # that the server asks to wait
        self.restart = restart  # what has arrived is of no use


def open_address(text: str | Path, retries: Retries = DEFAULT_RETRIES) -> Path | RemoteFolder:
    """What `text` (an entry of data.shards) names: a local folder, or a remote one; nothing is read yet.

    Raises `ConfigError` for a command, an address with shell characters and one that no driver is there for.
    """
    text = str(text)
    if _COMMAND.match(text):
        raise ConfigError(f"data.shards names {text!r}: no command is ever run; name a folder or an address")
    found = _SCHEME.match(text)
    if "://" in text and "::" in text:
        raise ConfigError(
            f"data.shards names {_public(text)!r}: addresses that wrap others are not read; name the folder"
        )
    if found is None:
        return _local_folder(text)
    scheme, rest = found.group(1).lower(), text[found.end() :]
    if scheme in _REFUSED_SCHEMES:
        raise ConfigError(f"data.shards names {_public(text)!r}: {scheme} is no store of files; name the folder itself")
    if scheme in _LOCAL_SCHEMES:
        return _local_folder(urllib.parse.unquote(rest.removeprefix("localhost")))
    path = rest.partition("?")[0] if scheme in ("http", "https") else rest
    if _SHELL_CHARACTERS.search(rest) or "&" in path or not path.strip("/"):
        raise ConfigError(
            f"data.shards names {_public(text)!r}, which is no address of a folder: write special characters as %XX; "
            "no command is ever run"
        )
    return HttpFolder(text, retries) if scheme in ("http", "https") else FsspecFolder(text, scheme)


def _local_folder(text: str) -> Path:
    folder = Path(text)
    # a folder may have any name that a file system takes; only one that is not there is likely to be meant otherwise
    if re.search(r"[|;<>`$\x00]|&&", text) and ("\0" in text or not folder.is_dir()):
        raise ConfigError(f"data.shards names {text!r}, which is no folder: no command is ever run; name a folder")
    return folder


def _public(address: str) -> str:
    """An address without password, key or signature."""
    return re.sub(r"//[^/@]*@", "//", address.partition("?")[0])


class HttpFolder:
    """A folder on a web server. A query (`?signature=...`) is sent with each file; user:password as basic log-in."""

    def __init__(self, address: str, retries: Retries = DEFAULT_RETRIES) -> None:
        parts = urllib.parse.urlsplit(address)
        self._query = parts.query
        user, _, host = parts.netloc.rpartition("@")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "mellow-ds"}
        if user:
            self._headers |= urllib3.make_headers(basic_auth=urllib.parse.unquote(user))
        self._root = f"{parts.scheme.lower()}://{host}{parts.path.rstrip('/')}"
        self._retries = retries  # for its time-outs
        self._pool: urllib3.PoolManager | None = None

    def where(self, name: str) -> str:
        """The address without query and password."""
        return f"{self._root}/{name}"

    def blocks(self, name: str, start: int) -> Iterator[tuple[int, bytes]]:
        """As `RemoteFolder.blocks`; one request, with a range where `start` is above 0."""
        try:
            response = self._request(name, start)
            try:
                place = _start_of(response, self.where(name), start)
                clock = _TrickleClock(self._retries.silence_seconds)
                while block := response.read1(_BLOCK_BYTES, decode_content=False):
                    yield place, block
                    place += len(block)
                    clock.count(len(block))
            finally:
                response.close()  # not given back to the pool: the rest of the body may still be on its way
        except urllib3.exceptions.LocationValueError as error:
            raise ShardError(f"{self.where(name)} is no address ({error}): correct data.shards") from None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, urllib3.exceptions.SSLError):
                raise ShardError(
                    f"{self.where(name)}: no trusted connection ({_plain(reason)}): set SSL_CERT_FILE to the "
                    "certificates that this server's is signed with"
                ) from None
            raise PassingProblem(_plain(reason)) from None
        except OSError as error:
            raise PassingProblem(_plain(error)) from None

    def _request(self, name: str, start: int) -> urllib3.BaseHTTPResponse:
        if self._pool is None:
            self._pool = _pool_for(self._root, self._retries)
        query = f"?{self._query}" if self._query else ""
        headers = {**self._headers, "Range": f"bytes={start}-"} if start else self._headers
        return self._pool.request(
            "GET",
            f"{self._root}/{urllib.parse.quote(name)}{query}",
            headers=headers,
            preload_content=False,
            # this file's own loop retries, with what has arrived; urllib3 only follows redirections
            retries=urllib3.Retry(total=_MAX_REDIRECTS, connect=0, read=0, status=0, other=0, raise_on_status=False),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _pool_for(address: str, retries: Retries) -> urllib3.PoolManager:
    """Connections for an address, through the proxy that the environment names for it (https_proxy, no_proxy, ...)."""
    settings: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=retries.connect_seconds, read=retries.silence_seconds),
        "maxsize": 8,  # connections kept: more than a process has threads that download
    }
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, **settings)
    return urllib3.PoolManager(**settings)


def _start_of(response: urllib3.BaseHTTPResponse, where: str, start: int) -> int:
    """The place in the file at which the body of `response` starts; raises where it is no part of the file."""
    status = response.status
    if status == 200:
        return 0
    if status == 206:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise PassingProblem("the server answers with another range than was asked for", restart=True)
        return start
    if status == 416:
        raise PassingProblem(f"the server has no more than {start} bytes", restart=True)
    name = _STATUS_NAMES.get(status, response.reason or "")
    if status in _PASSING_STATUS:
        raise PassingProblem(f"the server answers {status} ({name})", _retry_after(response))
    raise ShardError(
        f"{where} cannot be read: the server answers {status} ({name}); check the address in data.shards, and who may "
        "read it"
    )


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    """Seconds that the server asks to wait: a number or a date; 0 where it asks for nothing."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _plain(error: object) -> str:
    """The message of an error of urllib3 without names of objects and addresses in memory."""
    text = re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(error))
    return text or type(error).__name__


class _TrickleClock:
    """Notices a connection that brings a byte now and then, which no time-out of a socket sees."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = time.monotonic()
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Take the bytes of a block; raise `PassingProblem` where too few came for too long."""
        self._num_bytes += num_bytes
        seconds = time.monotonic() - self._started
        if self._num_bytes >= _TRICKLE_BYTES:
            self._started, self._num_bytes = time.monotonic(), 0
        elif seconds > self._seconds:
            raise PassingProblem(f"only {self._num_bytes} bytes came in {seconds:.0f} s")


class FsspecFolder:
    """A folder behind a driver of fsspec: s3, gs, az, hf, sftp, memory, ..."""

    def __init__(self, address: str, scheme: str) -> None:
        self._address = address.rstrip("/")
        self._found: tuple[Any, str] | None = None  # (file system, path of the folder in it)
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            package = _package_of(scheme, error)
            raise ConfigError(
                f"data.shards names {_public(address)}, which needs the package {package}: pip install {package}"
            ) from None
        except ValueError:
            raise ConfigError(
                f"data.shards names {_public(address)}, but no driver for {scheme}:// is known: use a folder, "
                "http(s):// or an address of fsspec, such as s3:// or gs://"
            ) from None

    def where(self, name: str) -> str:
        """The address without password."""
        return f"{_public(self._address)}/{name}"

    def blocks(self, name: str, start: int) -> Iterator[tuple[int, bytes]]:
        """As `RemoteFolder.blocks`; a request for each range, so that no open file is kept."""
        try:
            if self._found is None:
                self._found = url_to_fs(self._address)
            driver, root = self._found
            path = f"{root.rstrip('/')}/{name}"
            num_bytes = int(driver.info(path)["size"])
            if start > num_bytes:
                raise PassingProblem(f"it has no more than {num_bytes} bytes", restart=True)
            while start < num_bytes:
                block = driver.cat_file(path, start=start, end=min(start + _RANGE_BYTES, num_bytes))
                if not block:
                    raise PassingProblem(f"it ends at {start} of {num_bytes} bytes")
                yield start, block
                start += len(block)
        except (PassingProblem, FaultError, ShardError):
            raise
        except FileNotFoundError:
            raise ShardError(f"{self.where(name)} is not there: check the address in data.shards") from None
        except PermissionError as error:
            raise ShardError(f"{self.where(name)} may not be read ({error}): check who may read it") from None
        except Exception as error:  # drivers raise what the library below them raises
            raise PassingProblem(f"{type(error).__name__}: {error}".splitlines()[0]) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}


def _package_of(scheme: str, error: ImportError) -> str:
    """The name under which pip knows the driver of `scheme` (s3fs, gcsfs, adlfs, ...) or what the driver lacks."""
    lacking = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    module = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0]
    missing = module if module not in ("", "fsspec") else (lacking.name or "").partition(".")[0] or f"fsspec[{scheme}]"
    return missing.replace("_", "-")


def download(folder: RemoteFolder, name: str, file: BinaryIO, wanted: Wanted, retries: Retries) -> None:
    """Fill `file` with the file `name`, after what an earlier download left in it, until it is what is `wanted`.

    Drops, time-outs, busy servers and wrong bytes are tried again. Raises `ShardError` where the file is not there or
    another one, `FaultError` where the network does not allow it, and what writing to `file` raises.
    """
    target = _Target(file, wanted)
    failures = num_wrong = furthest = 0
    while True:
        try:
            target.receive(folder, name)
            return
        except PassingProblem as problem:
            failures = 1 if target.num_bytes >= furthest + _PROGRESS_BYTES else failures + 1
            furthest = max(furthest, target.num_bytes)
            if problem.restart:
                target.restart()
                num_wrong += 1
            if num_wrong >= _MAX_WRONG:
                raise ShardError(
                    f"{folder.where(name)} is not the file that the manifest names ({problem}, {num_wrong} times): "
                    "upload the shards anew"
                ) from None
            if failures >= retries.attempts:
                raise FaultError(
                    f"{folder.where(name)} could not be fetched in {failures} attempts, the last: {problem}; check "
                    "network and server, then start again: what has arrived is kept"
                ) from None
            seconds = retries.seconds_after(failures, problem.seconds)
            _log.info("%s: %s; again in %.1f s, from byte %d", folder.where(name), problem, seconds, target.num_bytes)
            time.sleep(seconds)


class _Target:
    """The file that a download goes to, with the hash of what is in it."""

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self._file = file
        self._wanted = wanted
        self._digest = hashlib.sha256()
        self.num_bytes = 0  # that are in it
        if wanted.num_bytes < 0:
            self.restart()  # what an earlier download left may be all of it, or more
            return
        file.seek(0)
        while block := file.read(_BLOCK_BYTES):
            self._digest.update(block)
            self.num_bytes += len(block)
        if self.num_bytes > wanted.num_bytes:
            self.restart()

    def restart(self) -> None:
        """Forget what is there."""
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def receive(self, folder: RemoteFolder, name: str) -> None:
        """Take what is missing; raise `PassingProblem` where the file is then not what is wanted."""
        if self.num_bytes != self._wanted.num_bytes:
            for place, block in folder.blocks(name, self.num_bytes):
                if place != self.num_bytes:
                    self.restart()  # the server does not skip
                self._write(block)
        if 0 <= self.num_bytes < self._wanted.num_bytes:
            raise PassingProblem(f"it ended after {self.num_bytes} of {self._wanted.num_bytes} bytes")
        if self._wanted.sha256 and self._digest.hexdigest() != self._wanted.sha256:
            raise PassingProblem("its SHA-256 differs", restart=True)

    def _write(self, block: bytes) -> None:
        most = self._wanted.num_bytes if self._wanted.num_bytes >= 0 else self._wanted.max_bytes
        if self.num_bytes + len(block) > most:
            raise PassingProblem(f"it has more than {most} bytes", restart=True)
        rest = memoryview(block)
        while rest:  # an unbuffered file may take a part
            rest = rest[self._file.write(rest) :]
        self._digest.update(block)
        self.num_bytes += len(block)
