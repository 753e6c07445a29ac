"""The first look at the audio: size, content hash and header of every source file. Decodes nothing.

Two paths with the same bytes are one clip: its key is the hash, its source the first path in alphabetical order. What
is known of files and clips is held in arrays, by number: some ten bytes each, however many questions there are.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.decode import BadClip, Header, read_header, read_source
from mellow_ds.packing.packed_keys import PACKED_DTYPE, pack_keys, unpack_key
from mellow_ds.shard_format import KEY_LENGTH

_BATCH = 1024  # files handed to the threads at once, so that Ctrl-C does not wait for a million
_NO_CLIP = -1


@dataclass(frozen=True)
class Survey:
    """What stands behind the paths that the records name. Clips are numbered from 0 in the order of their keys."""

    clip_of: np.ndarray  # [num_paths] int32, by number of the path: number of its clip; -1: bad, or not looked at
    keys: np.ndarray  # [num_clips] S16, ascending
    sources: np.ndarray  # [num_clips] int32: number of the path that stands for the clip
    checksums: np.ndarray  # [num_clips] uint64, of the bytes, to see that they are still the same when they are packed
    num_frames: np.ndarray  # [num_clips] int64, at the source's rate
    sample_rates: np.ndarray  # [num_clips] int32, Hz
    content_hash: str  # over all paths and contents; the same as long as a build would give the same

    @property
    def num_clips(self) -> int:
        """Different clips."""
        return len(self.keys)

    def key(self, clip: int) -> str:
        """The key of a clip, as shards name it."""
        return unpack_key(self.keys[clip])

    def clips_of_keys(self, keys: np.ndarray) -> np.ndarray:
        """[n] the numbers of clips by their keys [n] (S32, hexadecimal); all must be clips of this survey."""
        return np.searchsorted(self.keys, pack_keys(keys))

    def header(self, clip: int) -> Header:
        """What the header of a clip's source says of its length."""
        return Header(int(self.sample_rates[clip]), 1, int(self.num_frames[clip]))


def content_key(payload: bytes) -> str:
    """The key of a clip: a hash of its source file."""
    return hashlib.sha256(payload).hexdigest()[:KEY_LENGTH]


def source_checksum(payload: bytes) -> int:
    """XXH3-64: some ten times as fast as hashing a second time, and good enough against chance."""
    return xxhash.xxh3_64_intdigest(payload)


def survey_sources(audio_root: Path, catalogue: Catalogue, wanted: np.ndarray | None, workers: int, bar: Any) -> Survey:
    """Hash every file once, in threads (hashing and reading let others run); `bar.update` is called for each.

    `wanted` [num_paths] says by number which paths to look at; None: all. Faults go into the catalogue.
    """
    seen = _Seen()
    for number, clip in _look_at_all(audio_root, catalogue, wanted, workers):
        if isinstance(clip, BadClip):
            catalogue.note_fault(number, clip)
            seen.bad.append(number)
        else:
            seen.add(number, clip)
        bar.update()
    return seen.survey(catalogue)


@dataclass(frozen=True)
class _SourceClip:
    """What a file holds."""

    key: str
    header: Header
    checksum: int


class _Seen:
    """Files as they come, in alphabetical order."""

    def __init__(self) -> None:
        self.bad = array("i")
        self._numbers, self._keys, self._checksums = array("i"), bytearray(), array("Q")
        self._num_frames, self._sample_rates = array("q"), array("i")

    def add(self, number: int, clip: _SourceClip) -> None:
        """Take in a good file."""
        self._numbers.append(number)
        self._keys += bytes.fromhex(clip.key)
        self._checksums.append(clip.checksum)
        self._num_frames.append(clip.header.num_frames)
        self._sample_rates.append(clip.header.sample_rate)

    def survey(self, catalogue: Catalogue) -> Survey:
        """The files brought together to clips."""
        keys = np.frombuffer(self._keys, dtype=PACKED_DTYPE)
        order = np.argsort(keys, kind="stable")  # by key, then as they came: alphabetically
        keys = keys[order]
        numbers = np.array(self._numbers, np.int32)[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        clip_of = np.full(len(catalogue), _NO_CLIP, np.int32)
        clip_of[numbers] = np.cumsum(is_first) - 1
        firsts = order[is_first]
        return Survey(
            clip_of=clip_of,
            keys=keys[is_first],
            sources=numbers[is_first],
            checksums=np.array(self._checksums, np.uint64)[firsts],
            num_frames=np.array(self._num_frames, np.int64)[firsts],
            sample_rates=np.array(self._sample_rates, np.int32)[firsts],
            content_hash=_content_hash(catalogue, keys, numbers, self.bad),
        )


def _content_hash(catalogue: Catalogue, keys: np.ndarray, numbers: np.ndarray, bad: array) -> str:
    lines = _JoinedLines()
    for key, number in zip(keys, numbers, strict=True):
        lines.add(f"{unpack_key(key)} {catalogue.path_of(number)}")
    for number in bad:
        lines.add(f"- {catalogue.path_of(number)}")
    return lines.sha256()


class _JoinedLines:
    """The hash of lines with a line feed between every two."""

    def __init__(self) -> None:
        self._digest, self._between = hashlib.sha256(), b""

    def add(self, line: str) -> None:
        self._digest.update(self._between + line.encode())
        self._between = b"\n"

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _look_at_all(
    audio_root: Path, catalogue: Catalogue, wanted: np.ndarray | None, workers: int
) -> Iterator[tuple[int, _SourceClip | BadClip]]:
    with ThreadPoolExecutor(workers) as threads:
        for batch in _batches(catalogue, wanted):
            clips = threads.map(lambda entry: _look_at(audio_root, entry[1]), batch)
            yield from zip((number for number, _ in batch), clips, strict=True)


def _batches(catalogue: Catalogue, wanted: np.ndarray | None = None) -> Iterator[list[tuple[int, str]]]:
    """(number, path) of those that are wanted, in alphabetical order, some at a time."""
    paths = catalogue.in_order()
    if wanted is not None:
        paths = (entry for entry in paths if wanted[entry[0]])
    while batch := list(islice(paths, _BATCH)):
        yield batch


def _look_at(audio_root: Path, path: str) -> _SourceClip | BadClip:
    try:
        payload = read_source(audio_root / path)
        return _SourceClip(content_key(payload), read_header(payload), source_checksum(payload))
    except BadClip as fault:
        return fault


@dataclass(frozen=True)
class Listing:
    """The sources as the file system lists them: a cheap look for changes."""

    sha256: str  # over paths and sizes
    newest_change: float  # seconds; moves with every write, rename and attribute, also where a copy keeps its mtime
    file_bytes: np.ndarray  # [num_paths] int64, by number of the path; 0 where there is no such file


def list_sources(audio_root: Path, catalogue: Catalogue, workers: int) -> Listing:
    """Ask for the size and change time (ctime) of every source, in threads: a far file system answers slowly."""
    lines, newest, sizes = _JoinedLines(), 0.0, np.zeros(len(catalogue), np.int64)
    with ThreadPoolExecutor(workers) as threads:
        for batch in _batches(catalogue):
            answers = threads.map(lambda entry: _status(audio_root / entry[1]), batch)
            for (number, path), status in zip(batch, answers, strict=True):
                lines.add(f"{status.st_size} {path}" if status else f"- {path}")
                newest = max(newest, status.st_ctime) if status else newest
                sizes[number] = status.st_size if status else 0
    return Listing(lines.sha256(), newest, sizes)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
