"""Samples of shard folders by number, read by offset. Knows no order, no epoch, no tensors; decodes nothing.

Sizes of all local tars are checked when a reader is made, an index when its shard is first touched, a sample's checksum
each time it is read. A remote shard is downloaded whole when first needed (`shard_source`, `shard_cache`), then read
like a local one. File positions are never used, so readers in several processes do not disturb each other.
"""

import hashlib
import os
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mellow_ds.config.schema import DataConfig
from mellow_ds.data.fetch_ahead import FetchAhead
from mellow_ds.data.remote import DEFAULT_RETRIES, Retries
from mellow_ds.data.shard_cache import ShardCache, touch
from mellow_ds.data.shard_source import ShardSource, open_source
from mellow_ds.errors import ConfigError, ShardError
from mellow_ds.shard_format import (
    KEY_LENGTH,
    MAX_MEMBER_BYTES,
    FeatureInfo,
    Manifest,
    Question,
    SampleInfo,
    SampleText,
    ShardInfo,
    sample_checksum,
)

_MAX_OPEN_FILES = 256  # a quarter of the usual limit of a process
_MAX_INDEXES = 512  # 64 runs of windows of 4 shards, twice; 0.1 MB each for 256 MB of FLAC
_IDLE_SECONDS = 60.0  # a file of the cache that is not read for so long is closed, and may be removed before others
_AHEAD_PART = 0.5  # of the cache that downloads ahead may take: more, and they push out each other before they are read
_MAX_GAP_BYTES = 4096  # members of a sample are read at once when no more than a tar header stands between them

Value = TypeVar("Value")


class Place(NamedTuple):
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
        self._check(info)
        return info

    def question(self, number: int) -> Question:
        """One of its questions; the others are not decoded. Raises `BadSampleError`."""
        try:
            text: SampleText | None = self.__dict__.get("_text")
            if text is None:  # by hand: the lock of cached_property takes a third of the time of decoding
                text = SampleText.from_json(self.text, "")
                self._check(text)
                self.__dict__["_text"] = text
            return text.question(number, "")
        except BadSampleError:
            raise
        except ShardError as error:
            raise BadSampleError(self.place, "json", str(error).removeprefix(": ")) from None

    def _check(self, found: SampleInfo | SampleText) -> None:
        if (found.key, found.num_frames, len(found.questions)) != (self.place.key, self.num_frames, self.num_questions):
            problem = "its key, length or questions are not those in the index: build the shards anew"
            raise BadSampleError(self.place, "json", problem)


class _Entry(NamedTuple):
    """A row of an index as plain numbers."""

    key: bytes
    audio_offset: int
    audio_bytes: int
    json_offset: int
    json_bytes: int
    checksum: int
    num_frames: int
    num_questions: int


@dataclass(frozen=True)
class _Index:
    """The index of a shard and what is looked up in it."""

    where: str  # path or address of the tar
    rows: np.ndarray  # [samples] INDEX_DTYPE
    # arrays of Python: bisecting them takes a tenth of the time of numpy's searchsorted for a single number
    question_starts: "array[int]"  # [samples + 1] number of each sample's first question
    key_heads: "array[int]"  # [samples] the first 8 bytes of the keys, in their order
    by_key: "array[int]"  # [samples] row numbers in the order of the keys


class ShardReader:
    """The samples and questions of one or several shard folders, as one numbered list of shards."""

    def __init__(
        self,
        folders: Iterable[str | Path],
        sampling_rate: int,
        cache_folder: str | Path = DataConfig.cache_folder,
        cache_gigabytes: float = DataConfig.cache_gigabytes,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        """Read the manifests and check the size of every local tar. `folders` are paths or addresses.

        The cache and `retries` are for remote folders. Raises `ShardError` for a folder, manifest or tar that is
        missing or not as stated; `ConfigError` where an address cannot be used, a shard is larger than the cache, the
        folders hold different kinds of content, or were packed at another rate than `sampling_rate` Hz; `FaultError`
        where the network fails.
        """
        self.sampling_rate = sampling_rate
        self.manifests: list[Manifest] = []
        self.shards: list[tuple[Path, ShardInfo]] = []  # (folder on this machine, shard)
        self.subtypes: Counter[str] = Counter()  # questions by subtype
        self._sources: list[ShardSource] = []  # by folder
        self._source_of: list[int] = []  # by shard
        self._cache = ShardCache(cache_folder, round(cache_gigabytes * 1e9))
        names = [str(folder) for folder in folders]
        for name in names:
            self._add_source(name, open_source(name, self._cache, retries))
        self.num_questions = tuple(shard.num_questions for _, shard in self.shards)  # by shard
        self.num_examples = sum(self.num_questions)
        if not self.num_examples:
            given = ", ".join(names) or "(none given)"
            raise ShardError(f"shard folders {given} hold no questions: name folders made by `mellow-shards build`")
        self._start_empty()

    @classmethod
    def from_config(cls, folders: Iterable[str | Path], data: DataConfig) -> "ShardReader":
        """The reader of `folders` with the rate and the cache that the configuration names."""
        return cls(folders, data.sampling_rate, data.cache_folder, data.cache_gigabytes)

    def _start_empty(self) -> None:
        """Nothing open, nothing read yet."""
        self._indexes: _Newest[_Index] = _Newest(_MAX_INDEXES, self._load_index)
        self._files: _Newest[_OpenFile] = _Newest(_MAX_OPEN_FILES, self._open)
        self._ahead: FetchAhead | None = None
        self._examined: set[int] = set()  # shards whose cached file was hashed because a sample was bad

    def _add_source(self, name: str, source: ShardSource) -> None:
        manifest = source.manifest
        if manifest.sample_rate != self.sampling_rate:
            raise ConfigError(
                f"{name} was packed at {manifest.sample_rate} Hz, but data.sampling_rate is {self.sampling_rate}: "
                "set data.sampling_rate to the shards' rate, or pack anew"
            )
        if self.manifests and manifest.features != self.features:
            raise ConfigError(
                f"{name} holds {_content(manifest)}, but the shards before it hold {_content(self.manifests[0])}: "
                "use shards of one kind"
            )
        self.shards += [(source.folder, shard) for shard in manifest.shards]
        self._source_of += [len(self._sources)] * len(manifest.shards)
        self._sources.append(source)
        self.manifests.append(manifest)
        self.subtypes.update(manifest.subtypes)

    @property
    def features(self) -> FeatureInfo | None:
        """What the features are that the shards hold; None where they hold audio."""
        return self.manifests[0].features

    @property
    def fingerprint(self) -> str:
        """Hash over all that the content of the stream depends on; a resumed run compares it."""
        prints = [manifest.fingerprint for manifest in self.manifests]
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()[:KEY_LENGTH]

    def num_samples(self, shard: int) -> int:
        """Clips of a shard."""
        return self.shards[shard][1].num_samples

    def sample_questions(self, shard: int) -> np.ndarray:
        """[samples] number of questions of each sample of a shard, in the order of storage."""
        counts: np.ndarray = self._indexes[shard].rows["num_questions"]
        return counts

    def locate(self, shard: int, question: int) -> tuple[int, int]:
        """(row of the sample that holds it, number in that sample) of question number `question` of a shard."""
        starts = self._indexes[shard].question_starts
        row = bisect_right(starts, question) - 1
        return row, question - starts[row]

    def rows_of(self, shard: int, question: Question, sample: Sample, row: int) -> tuple[int, ...]:
        """Rows of the clips of a question that `sample` in `row` holds, in the order of the sequence."""
        own = sample.place.key
        return tuple([row if key == own else self._row(shard, key, sample) for key in question.clips])

    def sample(self, shard: int, row: int) -> Sample:
        """Read a sample and check it; raises `BadSampleError` naming shard, key and offset.

        Where the file of a remote shard was damaged in the cache, it is fetched again, once.
        """
        try:
            return self._sample(shard, row)
        except BadSampleError:
            if not self._renew(shard):
                raise
        return self._sample(shard, row)

    def _sample(self, shard: int, row: int) -> Sample:
        index = self._indexes[shard]
        entry = _Entry(*index.rows[row].item())
        place = Place(index.where, entry.key.decode("ascii", "replace"), entry.audio_offset)
        audio, text = self._read_members(shard, entry, place)
        if sample_checksum(audio, text) != entry.checksum:
            problem = "its checksum is not the one in the index: the file is damaged or was replaced"
            raise BadSampleError(place, "checksum", f"{problem}; copy it again or build the shards anew")
        return Sample(place, entry.num_frames, entry.num_questions, audio, text)

    def infos(self, shard: int) -> Iterable[SampleInfo]:
        """The JSON of every sample of a shard, in the order of storage; audio is not read and nothing is checked."""
        index = self._indexes[shard]
        for row in index.rows:
            entry = _Entry(*row.item())
            place = Place(index.where, entry.key.decode("ascii", "replace"), entry.json_offset)
            text = self._read(shard, place, entry.json_offset, entry.json_bytes)
            yield SampleInfo.from_json(bytes(text), str(place))

    @property
    def is_remote(self) -> bool:
        """Whether any of the shards comes over the network."""
        return any(source.is_remote for source in self._sources)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Bring remote shards to this machine in the background, in this order, in place of those asked for before.

        Returns at once. No more are fetched than fill half of the cache. What goes wrong is raised when the shard is
        read. Local shards are left alone.
        """
        wanted: list[int] = []
        room = self._cache.max_bytes * _AHEAD_PART or float("inf")
        for shard in dict.fromkeys(shards):
            room -= self.shards[shard][1].num_bytes
            if room < 0:
                break
            if self._source(shard).is_remote:
                wanted.append(shard)
        if wanted and self._ahead is None:
            self._ahead = FetchAhead(lambda shard: self._source(shard).fetch(self.shards[shard][1]))
        if self._ahead is not None:
            self._ahead.ask(wanted)

    def close(self) -> None:
        """Close all files, end downloads ahead; all starts again when needed."""
        self._files.clear()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __getstate__(self) -> dict[str, Any]:
        # a loader process opens its own files and reads its own indexes; sizes were checked here
        own = ("_indexes", "_files", "_ahead", "_examined")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def _source(self, shard: int) -> ShardSource:
        return self._sources[self._source_of[shard]]

    def _row(self, shard: int, key: str, sample: Sample) -> int:
        """Row of the clip `key`, which a question of `sample` names."""
        index, wanted = self._indexes[shard], key.encode()
        head = int.from_bytes(wanted[:8].ljust(8, b"\0"), "big")
        place = bisect_left(index.key_heads, head)
        while place < len(index.key_heads) and index.key_heads[place] == head:
            row = index.by_key[place]
            if index.rows[row].item()[0] == wanted:
                return row
            place += 1
        problem = f"a question names the clip {key}, which is not in this shard: build the shards anew"
        raise BadSampleError(sample.place, "missing clip", problem)

    def _load_index(self, shard: int) -> _Index:
        self._raise_fetch_error(shard)
        source, info = self._source(shard), self.shards[shard][1]
        rows = source.rows(info)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(rows["num_questions"], dtype=np.int64)])
        if starts[-1] != info.num_questions:
            raise ShardError(
                f"the index of {source.where(info)} counts {starts[-1]} questions; the manifest says "
                f"{info.num_questions}: build the shards anew"
            )
        by_key = np.argsort(rows["key"], kind="stable")
        keys = rows["key"][by_key]
        if len(doubles := keys[1:][keys[1:] == keys[:-1]]):
            double = doubles[0].decode("ascii", "replace")
            raise ShardError(f"{source.where(info)} holds the clip {double} twice: build the shards anew")
        heads = np.ascontiguousarray(keys).view(">u8").reshape(len(keys), -1)[:, 0]
        return _Index(
            where=source.where(info),
            rows=rows,
            question_starts=array("q", starts.tolist()),
            key_heads=array("Q", heads.tolist()),
            by_key=array("q", by_key.tolist()),
        )

    def _open(self, shard: int) -> "_OpenFile":
        self._raise_fetch_error(shard)
        source = self._source(shard)
        if source.is_remote:
            self._files.forget(_OpenFile.is_in_the_way)
        return _OpenFile(source.open(self.shards[shard][1]), source.is_remote)

    def _raise_fetch_error(self, shard: int) -> None:
        if self._ahead is not None:
            self._ahead.raise_error_of(shard)

    def _renew(self, shard: int) -> bool:
        """Whether reading a shard again may help: its cached file was damaged and is removed."""
        if shard in self._examined or not self._source(shard).is_remote:
            return False
        self._examined.add(shard)
        if not self._source(shard).renew(self.shards[shard][1], self._files[shard].descriptor):
            return False
        self._files.forget_number(shard)
        return True

    def _read_members(self, shard: int, entry: "_Entry", place: Place) -> tuple[memoryview, memoryview]:
        """(audio, JSON) of a sample; with one read where they are neighbours, which they are."""
        audio_start, text_start = entry.audio_offset, entry.json_offset
        audio_end, text_end = audio_start + entry.audio_bytes, text_start + entry.json_bytes
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
            file = self._files[shard]
            if file.is_cached:
                file.note_use()
            block = os.pread(file.descriptor, length, offset)
        except OverflowError:  # an offset that no file can have
            block = b""
        except OSError as error:
            raise ShardError(f"{place}: reading failed ({error.strerror}): check the disk or the mount") from None
        if len(block) != length:
            problem = f"the file ends {length - len(block)} bytes early: it was cut; copy it again or build anew"
            raise BadSampleError(place, "cut", problem)
        return memoryview(block)


def _content(manifest: Manifest) -> str:
    return "audio" if manifest.features is None else f"features of {manifest.features.encoder_name}"


class _OpenFile:
    """A descriptor that is closed with its last reference."""

    def __init__(self, descriptor: int, is_cached: bool) -> None:
        self.descriptor = descriptor
        self.is_cached = is_cached  # a file of the cache, which removes what was used longest ago
        self._used = self._told = time.monotonic()

    def note_use(self) -> None:
        """Keep in mind that it is being read, and tell the cache now and then."""
        self._used = time.monotonic()
        if self._used - self._told > _IDLE_SECONDS:
            self._told = self._used
            touch(self.descriptor)

    def is_in_the_way(self) -> bool:
        """Whether it keeps disk space of the cache for nothing: idle, or removed, which frees it only once closed."""
        if not self.is_cached:
            return False
        return time.monotonic() - self._used > _IDLE_SECONDS or os.fstat(self.descriptor).st_nlink == 0

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

    def forget(self, unwanted: Callable[[Value], bool]) -> None:
        """Forget those values of which `unwanted` holds."""
        for number in [number for number, value in self._values.items() if unwanted(value)]:
            del self._values[number]

    def forget_number(self, number: int) -> None:
        """Forget the value of `number`, where it is known."""
        self._values.pop(number, None)

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
