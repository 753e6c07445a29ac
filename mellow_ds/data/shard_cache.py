"""The files of remote shard folders on this machine's disk: shared by all processes of a node, bounded in size.

    FOLDER/KEY/shard-000000.tar                  whole and verified; KEY is that of a manifest
    FOLDER/KEY/shard-000000.tar.268435456.part   on its way; the number is the size that it will have
    FOLDER/.lock                                 held while room is made

Locks are `flock`s on these files themselves, so the kernel releases them when a process dies, however that comes: who
downloads holds its part exclusively, who reads a file holds it shared. A part whose downloader died is gone on with by
whoever needs it next. Room is made by removing what was used longest ago; the time of the last use is the file's time
of modification, set here. What is being read goes last, and Unix keeps it for its readers; what is being downloaded
stays.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mellow_ds.errors import ConfigError, FaultError

_log = logging.getLogger("mellow_ds.data")

_LOCK_NAME = ".lock"
_PART = ".part"
_POLL_SECONDS = 0.02  # between looks at a lock that another process holds
_MAX_POLL_SECONDS = 0.25
_MAX_STALL_SECONDS = 600.0  # of another process that holds a download and brings nothing: longer than it would retry


def default_cache_folder() -> Path:
    """$MELLOW_CACHE/shards, or mellow-ds/shards in the user's folder for caches ($XDG_CACHE_HOME, else ~/.cache)."""
    if os.environ.get("MELLOW_CACHE"):
        return Path(os.environ["MELLOW_CACHE"]) / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mellow-ds" / "shards"


@dataclass(frozen=True)
class CacheEntry:
    """A file that the cache holds or can hold."""

    key: str  # folder in the cache
    name: str
    num_bytes: int  # of the file; of an index what is set aside for it
    exact: bool = True  # a file of another size is damaged


@dataclass(frozen=True)
class _Held:
    """A file of the cache as it stands on the disk."""

    path: Path
    num_bytes: int  # a part counts as what it will have
    used: float  # seconds since 1970

    @property
    def is_part(self) -> bool:
        """Whether it is on its way."""
        return self.path.name.endswith(_PART)


class ShardCache:
    """A folder of downloaded files, at most `max_bytes` of them (0: no bound); picklable."""

    def __init__(self, folder: str | Path = "", max_bytes: int = 0) -> None:
        """`folder` empty: the default. Nothing is made on the disk before the first file is needed."""
        self.folder = Path(folder) if str(folder) else default_cache_folder()
        self.max_bytes = max_bytes
        self._num_removed_in_use = 0

    def check_room_for(self, num_bytes: int, where: str) -> None:
        """Raise `ConfigError` where a file can never be held."""
        if self.max_bytes and num_bytes > self.max_bytes:
            raise ConfigError(
                f"data.cache_gigabytes is {self.max_bytes / 1e9:g}, but {where} alone has {num_bytes / 1e9:g} GB: "
                "raise it, better to what the run reads at the same time (docs/shards.md), or set it to 0 for no bound"
            )

    def path(self, entry: CacheEntry) -> Path:
        """Where the file stands once it is there."""
        return self.folder / entry.key / entry.name

    def open(self, entry: CacheEntry, fetch: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the file, with its lock; `fetch` fills it where neither we nor another process have it.

        `fetch` gets a file that may hold the beginning from an earlier try. Raises what it raises, and `FaultError`
        where the disk or another process does not allow it.
        """
        self.check_room_for(entry.num_bytes, entry.name)
        with self._disk_faults():
            while True:
                descriptor = self._open_whole(entry)
                if descriptor is None:
                    descriptor = self._fetch(entry, fetch)
                if descriptor is not None:
                    return descriptor

    def holds(self, entry: CacheEntry) -> bool:
        """Whether the file is there; it then counts as used now, and is not the next to be removed."""
        with self._disk_faults():
            descriptor = self._open_whole(entry)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def discard(self, entry: CacheEntry, descriptor: int) -> None:
        """Remove the file that `descriptor` is open on, which turned out to be damaged; another one stays."""
        path = self.path(entry)
        with suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()

    def _open_whole(self, entry: CacheEntry) -> int | None:
        """A descriptor of the whole file with a shared lock; None where it is not there."""
        path = self.path(entry)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # held exclusively for moments only
        if not _is_at(descriptor, path):  # removed meanwhile
            os.close(descriptor)
            return None
        if entry.exact and os.fstat(descriptor).st_size != entry.num_bytes:
            _log.warning("%s has another size than the manifest says: it is fetched again", path)
            self.discard(entry, descriptor)
            os.close(descriptor)
            return None
        touch(descriptor)
        return descriptor

    def _fetch(self, entry: CacheEntry, fetch: Callable[[BinaryIO], None]) -> int | None:
        """Download under the part's lock and publish; None where another process did meanwhile."""
        path = self.path(entry)
        part = path.with_name(f"{entry.name}.{entry.num_bytes}{_PART}")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the folder was empty and is gone again
            return None
        try:
            if not _lock_part(descriptor, part):
                os.close(descriptor)
                return None
            if path.exists():
                part.unlink()
                os.close(descriptor)
                return None
            self._make_room(part)
            with open(descriptor, "r+b", buffering=0, closefd=False) as file:
                fetch(file)
            with self._lock():  # or who makes room would look for the part, find it gone, and not count the file
                part.rename(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException as error:
            # what has arrived is kept for the next try, unless it stands in the way
            with suppress(OSError):
                if os.fstat(descriptor).st_size == 0 or _is_full(error):
                    part.unlink()
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor

    def _make_room(self, own: Path) -> None:
        """Remove files until all, with the download `own`, are within the bound; wait for other downloads in it."""
        started = time.monotonic()
        while self.max_bytes and not self._remove_oldest():
            if time.monotonic() - started > _MAX_STALL_SECONDS:
                raise FaultError(
                    f"no room for {own.name} in {self.folder}: other downloads fill its {self.max_bytes / 1e9:g} GB; "
                    "raise data.cache_gigabytes"
                )
            time.sleep(_MAX_POLL_SECONDS)

    def _remove_oldest(self) -> bool:
        """Remove what was used longest ago until the bound holds; false where it cannot be reached now."""
        with self._lock():
            held = sorted(self._held(), key=lambda one: one.used)
            over = sum(one.num_bytes for one in held) - self.max_bytes
            busy: list[_Held] = []
            for one in held:
                if over <= 0:
                    return True
                if _remove_unlocked(one.path):
                    over -= one.num_bytes
                else:
                    busy.append(one)
            for one in busy:
                if over > 0 and not one.is_part:
                    self._warn_of_use(one)
                    with suppress(FileNotFoundError):
                        one.path.unlink()
                    over -= one.num_bytes
            return over <= 0

    def _warn_of_use(self, one: _Held) -> None:
        self._num_removed_in_use += 1
        if self._num_removed_in_use & (self._num_removed_in_use - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            _log.warning(
                "%s is removed from the cache although it is being read: data.cache_gigabytes (%g) is below what the "
                "processes of this node read at the same time; raise it",
                one.path.name,
                self.max_bytes / 1e9,
            )

    def _held(self) -> Iterator[_Held]:
        """All files that count."""
        for folder in _entries(self.folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for file in _entries(folder.path):
                with suppress(OSError):  # gone meanwhile
                    found = file.stat(follow_symlinks=False)
                    declared = file.name.removesuffix(_PART).rpartition(".")[2] if file.name.endswith(_PART) else ""
                    size = int(declared) if declared.isdigit() else found.st_size
                    yield _Held(Path(file.path), size, found.st_mtime)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        """Turn errors of the cache's own files into one line."""
        try:
            yield
        except OSError as error:
            if _is_full(error):
                raise FaultError(
                    f"the disk of data.cache_folder {self.folder} is full: free some of it, lower "
                    "data.cache_gigabytes, or name a folder on another disk"
                ) from None
            raise ConfigError(
                f"data.cache_folder {self.folder} cannot be used ({error.strerror}): name a folder on a disk of this "
                "node that can be written to"
            ) from None


def _entries(folder: str | Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def touch(descriptor: int) -> None:
    """Note that a file is used now."""
    with suppress(OSError):  # a cache on a disk that is only read is not pruned either
        os.utime(descriptor)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` names the file that `descriptor` is open on."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_part(descriptor: int, part: Path) -> bool:
    """Wait until the part is ours; false where it was published or removed meanwhile.

    Its other downloader may die, or stand still for good without dying, or publish it and hold it from then on as
    who reads it does: so whether it is a part still is looked at while it is locked, too.
    """
    size, changed, pause = -1, time.monotonic(), _POLL_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(descriptor, part)
        except BlockingIOError:
            if not _is_at(descriptor, part):
                return False
        found = os.fstat(descriptor).st_size
        if found != size:
            size, changed = found, time.monotonic()
        elif time.monotonic() - changed > _MAX_STALL_SECONDS:
            raise FaultError(
                f"another process downloads {part} and has brought nothing for {_MAX_STALL_SECONDS:.0f} s: look "
                "for one that is stopped, and end it"
            )
        time.sleep(pause)
        pause = min(2 * pause, _MAX_POLL_SECONDS)


def _remove_unlocked(path: Path) -> bool:
    """Remove a file that nobody reads or downloads; false where somebody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
        with suppress(OSError):
            path.parent.rmdir()  # the last file of a manifest
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
