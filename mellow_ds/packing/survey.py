"""The first pass of a build: content hash and header of every source file. Decodes nothing.

Two paths with the same bytes are one clip: its key is the hash, its source the first path in alphabetical order.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mellow_ds.packing.decode import BadClip, Header, read_header, read_source
from mellow_ds.shard_format import KEY_LENGTH

_BATCH = 1024  # files handed to the threads at once, so that Ctrl-C does not wait for a million


@dataclass(frozen=True)
class SourceClip:
    """A clip as it was found below the audio root."""

    key: str
    source: str  # path below the audio root
    header: Header
    checksum: int = 0  # of the bytes, to see that they are still the same when they are packed; 0: unknown


@dataclass(frozen=True)
class Survey:
    """What stands behind the paths that the records name."""

    clips: dict[str, SourceClip]  # by key
    key_of: dict[str, str]  # path below the audio root: key of its clip
    bad: dict[str, BadClip]  # path below the audio root: what is wrong with it

    @property
    def content_hash(self) -> str:
        """Hash over all paths and contents; the same as long as a build would give the same."""
        lines = sorted(f"{key} {path}" for path, key in self.key_of.items()) + sorted(f"- {path}" for path in self.bad)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content_key(payload: bytes) -> str:
    """The key of a clip: a hash of its source file."""
    return hashlib.sha256(payload).hexdigest()[:KEY_LENGTH]


def source_checksum(payload: bytes) -> int:
    """XXH3-64: some ten times as fast as hashing a second time, and good enough against chance."""
    return xxhash.xxh3_64_intdigest(payload)


def survey_sources(audio_root: Path, paths: Sequence[str], workers: int, bar: Any) -> Survey:
    """Hash every file once, in threads (hashing and reading let others run); `bar.update` is called for each."""
    found = Survey({}, {}, {})
    for path, clip in _look_at_all(audio_root, sorted(paths), workers):
        if isinstance(clip, BadClip):
            found.bad[path] = clip
        else:
            found.key_of[path] = clip.key
            found.clips.setdefault(clip.key, clip)
        bar.update()
    return found


def _look_at_all(audio_root: Path, paths: list[str], workers: int) -> Iterator[tuple[str, SourceClip | BadClip]]:
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            yield from zip(batch, threads.map(lambda path: _look_at(audio_root, path), batch), strict=True)


def _look_at(audio_root: Path, path: str) -> SourceClip | BadClip:
    try:
        payload = read_source(audio_root / path)
        return SourceClip(content_key(payload), path, read_header(payload), source_checksum(payload))
    except BadClip as fault:
        return fault


@dataclass(frozen=True)
class Listing:
    """The sources as the file system lists them: a cheap look for changes."""

    sha256: str  # over paths and sizes
    newest_change: float  # seconds; moves with every write, rename and attribute, also where a copy keeps its mtime
    file_bytes: dict[str, int]  # by path; 0 where there is no such file


def list_sources(audio_root: Path, paths: Collection[str], workers: int) -> Listing:
    """Ask for the size and change time (ctime) of every source, in threads: a far file system answers slowly."""
    ordered, lines, newest, sizes = sorted(paths), [], 0.0, {}
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(ordered), _BATCH):
            batch = ordered[start : start + _BATCH]
            for path, status in zip(batch, threads.map(lambda path: _status(audio_root / path), batch), strict=True):
                lines.append(f"{status.st_size} {path}" if status else f"- {path}")
                newest = max(newest, status.st_ctime) if status else newest
                sizes[path] = status.st_size if status else 0
    return Listing(hashlib.sha256("\n".join(lines).encode()).hexdigest(), newest, sizes)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
