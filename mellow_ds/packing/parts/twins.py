"""Questions that two parts of a build hold under one id, told apart again.

The id of a question counts records that say the same of the same clips. Records of one audio file go to one part, so
its count holds; but where the same audio lies under two paths, two parts may each have begun to count. The later part's
questions then get the next free numbers, as in one build.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mellow_ds.errors import PackingError
from mellow_ds.packing.parts.part_set import Part
from mellow_ds.shard_format import KEY_LENGTH, Question, SampleInfo, question_id, read_index

_ID_DTYPE = np.dtype(f"S{KEY_LENGTH}")


@dataclass(frozen=True)
class Renaming:
    """A question that gets another id."""

    part: int  # position among the parts
    shard: int  # position in the part's manifest
    key: str  # of the clip that it stands with
    old_id: str
    new_id: str


def find_twins(parts: Sequence[Part], bar: Any) -> list[Renaming]:
    """The questions that need another id; reads the JSON of every sample and no audio; `bar.update` for each.

    Holds some 100 bytes a question in memory. Raises `PackingError` where an index and a tar do not go together, or
    where a question stands twice in one part.
    """
    ids_of_parts = []
    for part in parts:
        ids = np.sort(_ids_of(part, bar))
        if len(_repeated(ids)):
            raise PackingError(f"{part.folder} holds a question twice: build part {part.number} anew")
        ids_of_parts.append(ids)
    everything = np.sort(np.concatenate(ids_of_parts))
    twins = set(_repeated(everything).tolist())
    return list(_rename(parts, twins, everything)) if twins else []


def _ids_of(part: Part, bar: Any) -> np.ndarray:
    """[num_questions] the ids of a part's questions, as hexadecimal digits."""
    ids = bytearray()
    for shard in range(len(part.manifest.shards)):
        for info in _samples(part, shard):
            for question in info.questions:
                ids += question.id.encode()
            bar.update()
    return np.frombuffer(bytes(ids), dtype=_ID_DTYPE)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """The entries of a sorted array that equal the one before."""
    return ids[1:][ids[1:] == ids[:-1]]


def _rename(parts: Sequence[Part], twins: set[bytes], everything: np.ndarray) -> Iterator[Renaming]:
    seen: set[str] = set()  # the first part that has an id keeps it
    given: set[str] = set()
    for number, part in enumerate(parts):
        for shard in range(len(part.manifest.shards)):
            for info in _samples(part, shard):
                for question in info.questions:
                    if question.id.encode() not in twins:
                        continue
                    if question.id not in seen:
                        seen.add(question.id)
                        continue
                    new_id = _next_free(question, everything, given)
                    given.add(new_id)
                    yield Renaming(number, shard, info.key, question.id, new_id)


def _next_free(question: Question, everything: np.ndarray, given: set[str]) -> str:
    for occurrence in itertools.count():
        name = question_id(question.clips, question.input, question.answer, question.subtype, occurrence)
        place = np.searchsorted(everything, np.array(name.encode(), dtype=_ID_DTYPE))
        is_taken = place < len(everything) and everything[place] == name.encode()
        if not is_taken and name not in given:
            return name
    raise AssertionError("counting never ends")


def _samples(part: Part, shard: int) -> Iterator[SampleInfo]:
    """The JSON of each sample of a shard that holds questions."""
    info = part.manifest.shards[shard]
    path = Path(part.folder) / info.name
    rows = read_index(part.folder, info)
    with path.open("rb") as tar:
        for row in rows[rows["num_questions"] > 0]:
            tar.seek(int(row["json_offset"]))
            payload = tar.read(int(row["json_bytes"]))
            sample = SampleInfo.from_json(payload, f"{path}, clip {row['key'].decode('ascii', 'replace')}")
            if len(sample.questions) != row["num_questions"]:
                raise PackingError(f"{path} does not fit its index at clip {sample.key}: build part {part.number} anew")
            yield sample
