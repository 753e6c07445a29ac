"""Records and the clips behind their paths, brought together: questions with content ids, and the records left out.

The records come a second time here, now that the clips are known, are sorted by clip on disk, and written out as
questions. In memory are numbers for each clip, the pairs of clips, and the questions of one clip at a time.
"""

import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import msgspec

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.decode import BadClip
from mellow_ds.packing.drop_list import DropList
from mellow_ds.packing.placement import Pairs
from mellow_ds.packing.question_file import QuestionWriter, StoredQuestion
from mellow_ds.packing.records import Record, Rejection
from mellow_ds.packing.rejections import Rejections
from mellow_ds.packing.sorted_runs import SortedRuns
from mellow_ds.packing.survey import Survey
from mellow_ds.shard_format import question_id

_NO_DROP_LIST = DropList()
_PLACE = struct.Struct(">IIQ")  # in front of a record while it is sorted: first clip, JSON file, position in it
_CLIP_BYTES = struct.calcsize(">I")
_CACHED_KEYS = 1 << 12


class _Texts(msgspec.Struct, array_like=True):
    """A record while it is sorted."""

    paths: tuple[int, ...]
    input: str
    answer: str
    subtype: str
    taskname: str
    captions: tuple[str, ...]


@dataclass
class QuestionSet:
    """The usable questions, in a file; what is known of them by clip, and the records that are left out."""

    file: QuestionWriter  # which knows where the questions of each clip are
    rejections: Rejections
    pairs: Pairs
    asked: bytearray  # [num_clips] 1 where a question is about the clip
    num_questions: array  # [num_clips] that stand with the clip
    num_chars: array  # [num_clips] of their texts
    subtypes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)  # by the drop list: with their "clip", or by "question"
    num_matched: int = 0  # keys and ids on the drop list that came up


def gather_questions(
    records: Iterable[Record | Rejection],
    files: Sequence[str],
    catalogue: Catalogue,
    survey: Survey,
    work: Path,
    drop_list: DropList = _NO_DROP_LIST,
) -> QuestionSet:
    """Questions of all records whose clips are usable as far as their headers say; the others are rejected.

    `files`: the names of the JSON files, in their order; `work`: a folder to write into. What `drop_list` names is left
    out and counted apart. The ids of the others stay as they are without one. Raises `JsonChanged` where a record names
    a file that was not looked at, `OSError` where the disk is full.
    """
    rejections = Rejections(work, files)
    runs = _sorted_by_clip(records, files, catalogue, survey, rejections, work)
    per_clip = bytes(8 * survey.num_clips)
    with QuestionWriter(work / "questions.part", survey.num_clips) as file:
        found = QuestionSet(
            file,
            rejections,
            Pairs(survey.num_clips),
            bytearray(survey.num_clips),
            array("q", per_clip),
            array("q", per_clip),
        )
        _write_by_clip(runs, survey, drop_list, found)
    runs.remove()
    return found


class JsonChanged(Exception):
    """The JSON files do not say what they said when the audio was looked at."""


def _sorted_by_clip(
    records: Iterable[Record | Rejection],
    files: Sequence[str],
    catalogue: Catalogue,
    survey: Survey,
    rejections: Rejections,
    work: Path,
) -> SortedRuns:
    runs = SortedRuns(work, "records")
    encode = msgspec.msgpack.Encoder().encode
    file_numbers = {name: number for number, name in enumerate(files)}
    clip_of, num_known = survey.clip_of.data, len(survey.clip_of)
    for record in records:
        if isinstance(record, Rejection):
            rejections.add(record)
            continue
        numbers = tuple(map(catalogue.number_of, record.paths))
        if max(numbers) >= num_known:
            raise JsonChanged
        bad = next((place for place, number in enumerate(numbers) if clip_of[number] < 0), None)
        if bad is not None:
            rejections.add(_rejected(record, record.paths[bad], catalogue.fault_of(numbers[bad])))
            continue
        texts = _Texts(numbers, record.input, record.answer, record.subtype, record.taskname, record.captions)
        runs.add(_PLACE.pack(clip_of[numbers[0]], file_numbers[record.file], record.number) + encode(texts))
    return runs


def _rejected(record: Record, path: str, fault: BadClip | None) -> Rejection:
    if fault is None:
        raise JsonChanged
    return Rejection(record.file, record.number, path, fault.reason, fault.detail)


def _write_by_clip(runs: SortedRuns, survey: Survey, drop_list: DropList, found: QuestionSet) -> None:
    """The questions of each clip, in the order of the records, into the file; `found` is filled."""
    clip_of, key_of = survey.clip_of.data, lru_cache(_CACHED_KEYS)(survey.key)
    decode = msgspec.msgpack.Decoder(_Texts).decode
    dropping = _Dropping(drop_list, found)
    for place, items in groupby(runs.merged(), key=itemgetter(slice(_CLIP_BYTES))):
        clip = int.from_bytes(place, "big")
        occurrences: Counter[str] = Counter()  # records that say the same stand with the same clip
        partners: set[int] = set()
        for item in items:
            _, file, number = _PLACE.unpack_from(item)
            texts = decode(memoryview(item)[_PLACE.size :])
            clips = [clip_of[path] for path in texts.paths]
            question = _question(file, number, texts, tuple(map(key_of, clips)), occurrences)
            if not dropping.takes(question):
                found.file.add(clip, question)
                found.num_questions[clip] += 1
                found.num_chars[clip] += sum(map(len, (texts.input, texts.answer, *texts.captions)))
                found.subtypes[texts.subtype] += 1
                partners.update(clips)
        for partner in partners:
            found.asked[partner] = True
        found.pairs.add(clip, sorted(partners))
    found.pairs.finish()
    found.num_matched = dropping.num_matched


def _question(
    file: int, number: int, texts: _Texts, clips: tuple[str, ...], occurrences: Counter[str]
) -> StoredQuestion:
    """The question of a record; `occurrences` counts those that say the same, by the id of the first."""
    content = (texts.input, texts.answer, texts.subtype)
    name = question_id(clips, *content, 0)
    occurrence = occurrences[name]
    occurrences[name] += 1
    if occurrence:
        name = question_id(clips, *content, occurrence)
    return StoredQuestion(file, number, texts.paths, name, clips, *content, texts.taskname, texts.captions)


class _Dropping:
    """Looks questions up in the drop list."""

    def __init__(self, drop_list: DropList, found: QuestionSet) -> None:
        self._list, self._found = drop_list, found
        self._clips_matched, self._questions_matched = (
            bytearray(len(drop_list.clips)),
            bytearray(len(drop_list.questions)),
        )

    @property
    def num_matched(self) -> int:
        """Entries of the list that came up."""
        return sum(self._clips_matched) + sum(self._questions_matched)

    def takes(self, question: StoredQuestion) -> bool:
        """Whether the question is to be left out; if so it is counted."""
        if not self._list.sha256:
            return False
        clips = [place for place in map(self._list.clips.place, question.clips) if place is not None]
        by_name = self._list.questions.place(question.id)
        for place in clips:
            self._clips_matched[place] = True
        if by_name is not None:
            self._questions_matched[by_name] = True
        if clips or by_name is not None:
            self._found.dropped["clip" if clips else "question"] += 1
        return bool(clips) or by_name is not None
