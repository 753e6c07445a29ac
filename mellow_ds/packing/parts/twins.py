"""Questions that two parts of a build hold under one id, told apart again.

The id of a question counts records that say the same of the same clips. Records of one audio file go to one part, so
its count holds; but where the same audio lies under two paths, two parts may each have begun to count. The later part's
questions then get the next free numbers, as in one build.

Questions of one id stand with one clip, so what has to be compared is, clip by clip, what stands with it in several
parts. In memory are the questions of one clip at a time.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mellow_ds.errors import PackingError
from mellow_ds.packing.hash_buckets import HashBuckets
from mellow_ds.packing.parts.part_set import Part
from mellow_ds.packing.parts.shard_copy import IdChanges
from mellow_ds.packing.sorted_runs import SortedRuns
from mellow_ds.shard_format import Question, SampleInfo, question_id, read_index

_PLACE = struct.Struct(">III")  # part, shard and row, in front of the changes of a sample


class Renamings:
    """Questions that get another id, by the sample that they stand in."""

    def __init__(self, work: Path) -> None:
        self._runs = SortedRuns(work, "renamings")

    def add(self, part: int, shard: int, row: int, changes: IdChanges) -> None:
        """Positions among the parts, in the part's manifest, in the index of the shard."""
        self._runs.add(_PLACE.pack(part, shard, row) + msgspec.json.encode(changes))

    def by_shard(self) -> Iterator[tuple[tuple[int, int], Iterator[tuple[int, IdChanges]]]]:
        """((part, shard), its (row, changes) in order), in order; each must be taken before the next."""
        decoder = msgspec.json.Decoder(IdChanges)
        items = ((_PLACE.unpack_from(item), item) for item in self._runs.merged())
        for place, group in itertools.groupby(items, key=lambda entry: entry[0][:2]):
            yield (place[0], place[1]), ((entry[0][2], decoder.decode(entry[1][_PLACE.size :])) for entry in group)


def check_samples(parts: Sequence[Part], bar: Any) -> None:
    """Read the JSON of every sample, and no audio; `bar.update` for each shard.

    Raises `PackingError` where an index and a tar do not go together, or a question stands twice.
    """
    for part in parts:
        for shard, info in enumerate(part.manifest.shards):
            rows = read_index(part.folder, info)
            for sample in _samples(part, shard, rows[rows["num_questions"] > 0]):
                if len({question.id for question in sample.questions}) < len(sample.questions):
                    raise _twice(part)
            bar.update()


def find_twins(parts: Sequence[Part], samples: HashBuckets, work: Path) -> Renamings:
    """The questions that need another id. `samples`: all of all parts, as `part_set.SAMPLE_DTYPE`.

    Raises `PackingError` where the questions of a clip stand in two samples of one part.
    """
    renamings = Renamings(work)
    for bucket in samples.buckets():
        rows = bucket[bucket["num_questions"] > 0]
        changes = np.flatnonzero(rows["key"][1:] != rows["key"][:-1]) + 1  # where another clip begins
        starts, ends = np.append(0, changes), np.append(changes, len(rows))
        for start, end in np.stack([starts, ends], axis=1)[ends - starts > 1].tolist():
            _tell_apart(parts, rows[start:end], renamings)
    return renamings


def _tell_apart(parts: Sequence[Part], places: np.ndarray, renamings: Renamings) -> None:
    """Compare the samples of one clip in several parts, in their order."""
    found: list[tuple[Any, tuple[Question, ...]]] = []
    for place in places:
        part = parts[place["part"]]
        if found and place["part"] == found[-1][0]["part"]:
            raise _twice(part)
        shard = int(place["shard"])
        rows = read_index(part.folder, part.manifest.shards[shard])[place["row"] :][:1]
        found.append((place, next(_samples(part, shard, rows)).questions))
    taken = {question.id for _, questions in found for question in questions}
    seen: set[str] = set()  # the first part that has an id keeps it
    for place, questions in found:
        changes = []
        for question in questions:
            if question.id in seen:
                changes.append((question.id, _next_free(question, taken)))
                taken.add(changes[-1][1])
            seen.add(question.id)
        if changes:
            renamings.add(int(place["part"]), int(place["shard"]), int(place["row"]), changes)


def _next_free(question: Question, taken: set[str]) -> str:
    for occurrence in itertools.count():
        name = question_id(question.clips, question.input, question.answer, question.subtype, occurrence)
        if name not in taken:
            return name
    raise AssertionError("counting never ends")


def _twice(part: Part) -> PackingError:
    return PackingError(f"{part.folder} holds a question twice: build part {part.number} anew")


def _samples(part: Part, shard: int, rows: np.ndarray) -> Iterator[SampleInfo]:
    """The JSON of the samples of a shard that its index rows name."""
    path = Path(part.folder) / part.manifest.shards[shard].name
    with path.open("rb") as tar:
        for row in rows:
            tar.seek(int(row["json_offset"]))
            payload = tar.read(int(row["json_bytes"]))
            sample = SampleInfo.from_json(payload, f"{path}, clip {row['key'].decode('ascii', 'replace')}")
            if len(sample.questions) != row["num_questions"]:
                raise PackingError(f"{path} does not fit its index at clip {sample.key}: build part {part.number} anew")
            yield sample
