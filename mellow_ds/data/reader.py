"""Samples of shard folders by number, read by offset. Knows no order, no epoch, no tensors; decodes nothing.

Sizes of all tars are checked when a reader is made, an index when its shard is first touched, a sample's checksum each
time it is read. File positions are never used, so readers in several processes do not disturb each other.
"""

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mellow_ds.errors import ConfigError, ShardError
from mellow_ds.shard_format import (
    KEY_LENGTH,
    MAX_MEMBER_BYTES,
    Manifest,
    Question,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    read_index,
    read_manifest,
    sample_checksum,
)

_MAX_OPEN_FILES = 256  # a quarter of the usual limit of a process
_MAX_INDEXES = 512  # 64 runs of windows of 4 shards, twice; 0.1 MB each for 256 MB of FLAC
_MAX_GAP_BYTES = 4096  # members of a sample are read at once when no more than a tar header stands between them

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where a sample stands, for messages."""

    shard: str  # path of the tar
    key: str
    offset: int  # bytes from the start of the tar

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.key} at offset {self.offset}"


class BadSampleError(ShardError):
    """One sample cannot be used; the rest of its shard may be good."""

    def __init__(self, place: Place, kind: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.kind = kind  # "checksum", "cut", "json", "audio" or "missing clip"
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSampleError, (self.place, self.kind, self.problem)


@dataclass(frozen=True)
class Sample:
    """A clip as it is stored, with its questions."""

    place: Place
    num_frames: int  # as the index says
    num_questions: int  # as the index says
    audio: memoryview  # a FLAC or WAV file
    text: memoryview  # the JSON

    @property
    def num_bytes(self) -> int:
        """Read from the shard."""
        return len(self.audio) + len(self.text)

    @cached_property
    def info(self) -> SampleInfo:
        """The JSON, parsed when first asked for: of a second clip hardly ever. Raises `BadSampleError`."""
        try:
            info = SampleInfo.from_json(bytes(self.text), str(self.place))
        except ShardError as error:
            raise BadSampleError(self.place, "json", str(error).removeprefix(f"{self.place}: ")) from None
        if (info.key, info.num_frames, len(info.questions)) != (self.place.key, self.num_frames, self.num_questions):
            problem = "its key, length or questions are not those in the index: build the shards anew"
            raise BadSampleError(self.place, "json", problem)
        return info


@dataclass(frozen=True)
class _Index:
    """The index of a shard and what is looked up in it."""

    rows: np.ndarray  # [samples] INDEX_DTYPE
    question_starts: np.ndarray  # [samples + 1] number of each sample's first question
    by_key: np.ndarray  # [samples] row numbers in the order of the keys


class ShardReader:
    """The samples and questions of one or several shard folders, as one numbered list of shards."""

    def __init__(self, folders: Iterable[str | Path], sampling_rate: int) -> None:
        """Read the manifests and check the size of every tar.

        Raises `ShardError` for a folder, manifest or tar that is missing or not as stated, and `ConfigError` where
        the shards were packed at another rate than `sampling_rate` Hz.
        """
        self.sampling_rate = sampling_rate
        self.manifests: list[Manifest] = []
        self.shards: list[tuple[Path, ShardInfo]] = []  # (folder, shard)
        self.subtypes: Counter[str] = Counter()  # questions by subtype
        paths = [Path(folder) for folder in folders]
        for path in paths:
            self._add_folder(path)
        self.num_questions = tuple(shard.num_questions for _, shard in self.shards)  # by shard
        self.num_examples = sum(self.num_questions)
        if not self.num_examples:
            names = ", ".join(map(str, paths)) or "(none given)"
            raise ShardError(f"shard folders {names} hold no questions: name folders made by `mellow-shards build`")
        self._indexes: _Newest[_Index] = _Newest(_MAX_INDEXES, self._load_index)
        self._files: _Newest[_OpenFile] = _Newest(_MAX_OPEN_FILES, self._open)

    def _add_folder(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if manifest.sample_rate != self.sampling_rate:
            raise ConfigError(
                f"{folder} was packed at {manifest.sample_rate} Hz, but data.sampling_rate is {self.sampling_rate}: "
                "set data.sampling_rate to the shards' rate, or pack anew"
            )
        for shard in manifest.shards:
            check_shard_size(folder, shard)
            self.shards.append((folder, shard))
        self.manifests.append(manifest)
        self.subtypes.update(manifest.subtypes)

    @property
    def fingerprint(self) -> str:
        """Hash over all that the content of the stream depends on; a resumed run compares it."""
        prints = [manifest.fingerprint for manifest in self.manifests]
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()[:KEY_LENGTH]

    def num_samples(self, shard: int) -> int:
        """Clips of a shard."""
        return self.shards[shard][1].num_samples

    def locate(self, shard: int, question: int) -> tuple[int, int]:
        """(row of the sample that holds it, number in that sample) of question number `question` of a shard."""
        starts = self._indexes[shard].question_starts
        row = int(np.searchsorted(starts, question, side="right")) - 1
        return row, question - int(starts[row])

    def rows_of(self, shard: int, question: Question, sample: Sample) -> tuple[int, ...]:
        """Rows of the clips of a question that `sample` holds, in the order of the sequence."""
        return tuple(self._row(shard, key, sample) for key in question.clips)

    def sample(self, shard: int, row: int) -> Sample:
        """Read a sample and check it; raises `BadSampleError` naming shard, key and offset."""
        entry = self._indexes[shard].rows[row]
        place = self._place(shard, entry, "audio_offset")
        audio, text = self._read_members(shard, entry, place)
        if sample_checksum(audio, text) != int(entry["checksum"]):
            problem = "its checksum is not the one in the index: the file is damaged or was replaced"
            raise BadSampleError(place, "checksum", f"{problem}; copy it again or build the shards anew")
        return Sample(place, int(entry["num_frames"]), int(entry["num_questions"]), audio, text)

    def infos(self, shard: int) -> Iterable[SampleInfo]:
        """The JSON of every sample of a shard, in the order of storage; audio is not read and nothing is checked."""
        for entry in self._indexes[shard].rows:
            place = self._place(shard, entry, "json_offset")
            text = self._read(shard, place, place.offset, int(entry["json_bytes"]))
            yield SampleInfo.from_json(bytes(text), str(place))

    def close(self) -> None:
        """Close all files; they open again when needed."""
        self._files.clear()

    def __getstate__(self) -> dict[str, Any]:
        # a loader process opens its own files and reads its own indexes; sizes were checked here
        return {name: value for name, value in self.__dict__.items() if name not in ("_indexes", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indexes = _Newest(_MAX_INDEXES, self._load_index)
        self._files = _Newest(_MAX_OPEN_FILES, self._open)

    def _place(self, shard: int, entry: np.void, offset: str) -> Place:
        folder, info = self.shards[shard]
        return Place(str(folder / info.name), entry["key"].decode(), int(entry[offset]))

    def _row(self, shard: int, key: str, sample: Sample) -> int:
        """Row of the clip `key`, which a question of `sample` names."""
        index = self._indexes[shard]
        wanted = np.bytes_(key.encode())
        place = int(np.searchsorted(index.rows["key"], wanted, sorter=index.by_key))
        if place == len(index.by_key) or index.rows["key"][index.by_key[place]] != wanted:
            problem = f"a question names the clip {key}, which is not in this shard: build the shards anew"
            raise BadSampleError(sample.place, "missing clip", problem)
        return int(index.by_key[place])

    def _load_index(self, shard: int) -> _Index:
        folder, info = self.shards[shard]
        rows = read_index(folder, info)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(rows["num_questions"], dtype=np.int64)])
        if starts[-1] != info.num_questions:
            raise ShardError(
                f"the index of {folder / info.name} counts {starts[-1]} questions; the manifest says "
                f"{info.num_questions}: build the shards anew"
            )
        return _Index(rows, starts, np.argsort(rows["key"], kind="stable"))

    def _open(self, shard: int) -> "_OpenFile":
        folder, info = self.shards[shard]
        check_shard_size(folder, info)  # again: it may have been replaced since the start
        try:
            return _OpenFile(os.open(folder / info.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        except OSError as error:
            raise ShardError(f"{folder / info.name} cannot be opened ({error.strerror})") from None

    def _read_members(self, shard: int, entry: np.void, place: Place) -> tuple[memoryview, memoryview]:
        """(audio, JSON) of a sample; with one read where they are neighbours, which they are."""
        audio_start, text_start = int(entry["audio_offset"]), int(entry["json_offset"])
        audio_end, text_end = audio_start + int(entry["audio_bytes"]), text_start + int(entry["json_bytes"])
        first, length = min(audio_start, text_start), max(audio_end, text_end) - min(audio_start, text_start)
        if length > audio_end - audio_start + text_end - text_start + _MAX_GAP_BYTES:
            audio = self._read(shard, place, audio_start, audio_end - audio_start)
            return audio, self._read(shard, place, text_start, text_end - text_start)
        block = self._read(shard, place, first, length)
        return block[audio_start - first : audio_end - first], block[text_start - first : text_end - first]

    def _read(self, shard: int, place: Place, offset: int, length: int) -> memoryview:
        if length > MAX_MEMBER_BYTES:
            raise ShardError(f"{place}: its {length} bytes are more than a sample may have ({MAX_MEMBER_BYTES})")
        try:
            block = os.pread(self._files[shard].descriptor, length, offset)
        except OSError as error:
            raise ShardError(f"{place}: reading failed ({error.strerror}): check the disk or the mount") from None
        if len(block) != length:
            problem = f"the file ends {length - len(block)} bytes early: it was cut; copy it again or build anew"
            raise BadSampleError(place, "cut", problem)
        return memoryview(block)


class _OpenFile:
    """A descriptor that is closed with its last reference."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Newest(Generic[Value]):
    """The most recently used values of a function of a number, made when first asked for."""

    def __init__(self, capacity: int, make: Callable[[int], Value]) -> None:
        self._capacity = capacity
        self._make = make
        self._values: OrderedDict[int, Value] = OrderedDict()

    def __getitem__(self, number: int) -> Value:
        if number not in self._values:
            if len(self._values) >= self._capacity:
                self._values.popitem(last=False)
            self._values[number] = self._make(number)
        self._values.move_to_end(number)
        return self._values[number]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
