"""Where a reader gets the shards of one folder from: a folder of this machine, or a remote one by way of the cache.

Both give the manifest, the rows of an index and a descriptor of a tar; nothing here knows of samples.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from mellow_ds.data.remote import DEFAULT_RETRIES, RemoteFolder, Retries, Wanted, download, open_address
from mellow_ds.data.shard_cache import CacheEntry, ShardCache
from mellow_ds.errors import ShardError
from mellow_ds.shard_format import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    check_shard_size,
    index_name,
    read_index,
    read_manifest,
)

_log = logging.getLogger("mellow_ds.data")

_MAX_MANIFEST_BYTES = 256 * 1024 * 1024  # 300 bytes a shard: more than 800,000 shards
_INDEX_HEADER_BYTES = 1024  # of a .npy file, set aside beside the rows
_KEY_LENGTH = 32  # hexadecimal digits of a manifest's hash
_BLOCK_BYTES = 1024 * 1024


class ShardSource(Protocol):
    """One shard folder; picklable, so that loader processes can go on with it."""

    folder: Path  # on this machine
    manifest: Manifest
    is_remote: bool

    def where(self, shard: ShardInfo) -> str:
        """Path or address of a tar, for messages."""
        ...

    def rows(self, shard: ShardInfo) -> np.ndarray:
        """The index [num_samples] of a shard (INDEX_DTYPE); raises `ShardError` where it is not the manifest's."""
        ...

    def open(self, shard: ShardInfo) -> int:
        """A descriptor of a tar of the manifest's size; raises `ShardError`."""
        ...

    def renew(self, shard: ShardInfo, descriptor: int) -> bool:
        """Whether a tar in which something is wrong was damaged here, so that opening it again may help."""
        ...

    def fetch(self, shard: ShardInfo) -> None:
        """Bring a tar and its index to this machine, where they are not."""
        ...


def open_source(address: str | Path, cache: ShardCache, retries: Retries = DEFAULT_RETRIES) -> ShardSource:
    """The shard folder at a path or address, with its manifest read; raises `ShardError` or `ConfigError`."""
    found = open_address(address, retries)
    return LocalSource(found) if isinstance(found, Path) else RemoteSource(found, cache, retries)


class LocalSource:
    """A folder of this machine or of a shared file system."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        """Read the manifest and check the size of every tar."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        for shard in self.manifest.shards:
            check_shard_size(folder, shard)

    def where(self, shard: ShardInfo) -> str:
        """The path of a tar."""
        return str(self.folder / shard.name)

    def rows(self, shard: ShardInfo) -> np.ndarray:
        """As `ShardSource.rows`."""
        return _read_rows(self.folder, shard)

    def open(self, shard: ShardInfo) -> int:
        """As `ShardSource.open`."""
        check_shard_size(self.folder, shard)  # again: it may have been replaced since the start
        try:
            return os.open(self.folder / shard.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ShardError(f"{self.where(shard)} cannot be opened ({error.strerror})") from None

    def renew(self, shard: ShardInfo, descriptor: int) -> bool:  # noqa: ARG002 (the protocol's)
        """False: there is nowhere to fetch it from."""
        return False

    def fetch(self, shard: ShardInfo) -> None:
        """Nothing to do."""


class RemoteSource:
    """A folder behind an address. The manifest is fetched now, an index and a tar when first needed."""

    is_remote = True

    def __init__(self, remote: RemoteFolder, cache: ShardCache, retries: Retries = DEFAULT_RETRIES) -> None:
        """Raises `ShardError` where there is no manifest, `ConfigError` where a shard is larger than the cache."""
        self._remote = remote
        self._cache = cache
        self._retries = retries
        payload = self._fetch_manifest()
        self.manifest = _parse_manifest(payload, remote.where(MANIFEST_NAME))
        # another manifest, another folder: no file of an older build is ever taken for one of this
        self._key = hashlib.sha256(payload).hexdigest()[:_KEY_LENGTH]
        self.folder = cache.folder / self._key
        if self.manifest.shards:
            largest = max(self.manifest.shards, key=lambda shard: shard.num_bytes)
            cache.check_room_for(largest.num_bytes + self._index_entry(largest).num_bytes, self.where(largest))

    def where(self, shard: ShardInfo) -> str:
        """The address of a tar."""
        return self._remote.where(shard.name)

    def rows(self, shard: ShardInfo) -> np.ndarray:
        """As `ShardSource.rows`; fetched again where the one in the cache is damaged."""
        descriptor = self._open_index(shard)
        try:
            if _sha256_of(descriptor) != shard.index_sha256:
                self._cache.discard(self._index_entry(shard), descriptor)
                os.close(descriptor)
                descriptor = self._open_index(shard)
            return _read_rows(self.folder, shard)
        finally:
            os.close(descriptor)

    def open(self, shard: ShardInfo) -> int:
        """As `ShardSource.open`; downloads it first where the cache lacks it."""
        wanted = Wanted(shard.sha256, shard.num_bytes)
        return self._cache.open(self._tar_entry(shard), lambda file: self._download(shard.name, file, wanted))

    def renew(self, shard: ShardInfo, descriptor: int) -> bool:
        """Hash the cached tar and remove it where it is damaged; a tar that is as it was uploaded stays."""
        if _sha256_of(descriptor) == shard.sha256:
            return False
        _log.warning("%s was damaged in the cache %s: it is fetched again", self.where(shard), self.folder)
        self._cache.discard(self._tar_entry(shard), descriptor)
        return True

    def fetch(self, shard: ShardInfo) -> None:
        """As `ShardSource.fetch`; the index comes first, as it is needed first."""
        if not self._cache.holds(self._index_entry(shard)):
            os.close(self._open_index(shard))
        if not self._cache.holds(self._tar_entry(shard)):
            os.close(self.open(shard))

    def _open_index(self, shard: ShardInfo) -> int:
        name, wanted = index_name(shard.name), Wanted(shard.index_sha256)
        return self._cache.open(self._index_entry(shard), lambda file: self._download(name, file, wanted))

    def _download(self, name: str, file: BinaryIO, wanted: Wanted) -> None:
        if wanted.num_bytes > 0:
            _log.debug("fetching %s (%.1f MB)", self._remote.where(name), wanted.num_bytes / 1e6)
        download(self._remote, name, file, wanted, self._retries)

    def _tar_entry(self, shard: ShardInfo) -> CacheEntry:
        return CacheEntry(self._key, shard.name, shard.num_bytes)

    def _index_entry(self, shard: ShardInfo) -> CacheEntry:
        num_bytes = shard.num_samples * INDEX_DTYPE.itemsize + _INDEX_HEADER_BYTES
        return CacheEntry(self._key, index_name(shard.name), num_bytes, exact=False)

    def _fetch_manifest(self) -> bytes:
        """The manifest's bytes; tried again where it is no JSON, as nothing else tells that it was cut on the way."""
        for _ in range(self._retries.attempts):
            file = io.BytesIO()
            download(self._remote, MANIFEST_NAME, file, Wanted(max_bytes=_MAX_MANIFEST_BYTES), self._retries)
            try:
                json.loads(file.getvalue())
                break
            except ValueError:
                continue
        return file.getvalue()


def _read_rows(folder: Path, shard: ShardInfo) -> np.ndarray:
    """The index of a shard in `folder`; an array file that is not one, with the hash that is wanted, is refused too."""
    try:
        return read_index(folder, shard)
    except ShardError:
        raise
    except Exception as error:
        # numpy's, of many kinds: a header that is none, announces objects to unpickle or more rows than memory holds
        path, problem = folder / index_name(shard.name), str(error).partition("\n")[0]
        raise ShardError(f"{path} is no index ({type(error).__name__}: {problem}): build the shards anew") from None


def _parse_manifest(payload: bytes, where: str) -> Manifest:
    """The manifest in `payload`; raises `ShardError` naming `where`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST_NAME
        path.write_bytes(payload)
        try:
            return read_manifest(folder)
        except ShardError as error:
            raise ShardError(str(error).replace(str(path), where)) from None


def _sha256_of(descriptor: int) -> str:
    """SHA-256 of a whole file; its position is not used."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK_BYTES, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()
