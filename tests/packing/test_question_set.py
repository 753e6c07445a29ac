"""Questions from records: content ids, repeated records, records with a bad clip."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.packing import sorted_runs
from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.decode import BadClip
from mellow_ds.packing.question_file import StoredQuestion, read_questions
from mellow_ds.packing.question_set import JsonChanged, QuestionSet, gather_questions
from mellow_ds.packing.records import Record, Rejection
from mellow_ds.packing.survey import Survey
from mellow_ds.shard_format import question_id


def record(number: int, *paths: str, answer: str = "yes", file: str = "r.json") -> Record:
    return Record(file, number, paths, (), "tone?", answer, "binary", "test")


def key(letter: str) -> str:
    return letter * 32


def gather(
    folder: Path,
    records: list[Record | Rejection],
    good: dict[str, str],
    bad: tuple[str, ...] = (),
    passed_over: tuple[str, ...] = (),
) -> QuestionSet:
    """Questions of the records; `good`: path and letter of the key of its clip, `bad`: paths that cannot be used."""
    with Catalogue(None) as catalogue:
        numbers = {path: catalogue.number_of(path) for path in (*good, *bad, *passed_over)}
        letters = sorted(set(good.values()))
        clip_of = np.full(len(catalogue), -1, np.int32)
        for path, letter in good.items():
            clip_of[numbers[path]] = letters.index(letter)
        for path in bad:
            catalogue.note_fault(numbers[path], BadClip("file is missing"))
        keys = np.array([bytes.fromhex(key(letter)) for letter in letters], "S16")
        nothing = np.zeros(len(letters), np.int64)
        survey = Survey(clip_of, keys, nothing, nothing, nothing, nothing, "")
        return gather_questions(records, ["z.json", "r.json"], catalogue, survey, folder)


def questions_of(found: QuestionSet) -> list[list[StoredQuestion]]:
    """By clip."""
    with found.file.path.open("rb", buffering=0) as file:
        return [list(read_questions(file, found.file.span(clip))) for clip in range(len(found.asked))]


def test_ids_are_content_hashes_and_tell_repetitions_apart(tmp_path: Path) -> None:
    records: list[Record | Rejection] = [
        record(0, "x", "y"),
        record(1, "x", "y"),
        record(2, "y", "x"),
        record(3, "x", "y"),
    ]
    found = gather(tmp_path, records, {"x": "a", "y": "b"})
    with_first, with_second = questions_of(found)
    assert [(question.number, question.id) for question in with_first] == [
        (0, question_id((key("a"), key("b")), "tone?", "yes", "binary", 0)),
        (1, question_id((key("a"), key("b")), "tone?", "yes", "binary", 1)),
        (3, question_id((key("a"), key("b")), "tone?", "yes", "binary", 2)),
    ]
    assert [(question.number, question.id) for question in with_second] == [
        (2, question_id((key("b"), key("a")), "tone?", "yes", "binary", 0))
    ]
    assert (list(found.num_questions), found.subtypes) == ([3, 1], {"binary": 4})
    assert [list(found.pairs.of(clip)) for clip in (0, 1)] == [[1], [0]]


def test_what_is_left_on_disk_comes_out_as_what_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record | Rejection] = [
        record(number, *paths, answer=str(number % 5), file=file)
        for file in ("z.json", "r.json")
        for number, paths in enumerate(itertools.islice(itertools.cycle([("x",), ("y", "x"), ("x", "z"), ("z",)]), 300))
    ]
    whole = gather(tmp_path, records, {"x": "a", "y": "b", "z": "a"})
    wanted, pairs = questions_of(whole), [list(whole.pairs.of(clip)) for clip in (0, 1)]
    assert [(question.file, question.number) for question in wanted[1]] == [
        (file, number) for file in (0, 1) for number in range(1, 300, 4)
    ], "in the order of the files as they were given"
    keep_run, runs = sorted_runs.SortedRuns._keep_run, []

    def counted(self: sorted_runs.SortedRuns, level: int, items: object) -> None:
        runs.append(level)
        keep_run(self, level, items)  # type: ignore[arg-type]

    monkeypatch.setattr(sorted_runs.SortedRuns, "_keep_run", counted)
    monkeypatch.setattr(sorted_runs.SortedRuns.__init__, "__defaults__", (1_000,))
    again = gather(tmp_path, records, {"x": "a", "y": "b", "z": "a"})
    assert len(runs) > 20
    assert (questions_of(again), [list(again.pairs.of(clip)) for clip in (0, 1)]) == (wanted, pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["questions.part"]


def test_a_bad_clip_takes_all_its_records_out(tmp_path: Path) -> None:
    records: list[Record | Rejection] = [
        record(3, "gone"),
        Rejection("r.json", 0, "", "not an object", "str"),
        record(1, "x"),
        record(2, "x", "gone"),
        record(7, "gone", file="z.json"),
    ]
    found = gather(tmp_path, records, {"x": "a"}, bad=("gone",))
    assert [[question.number for question in own] for own in questions_of(found)] == [[1]]
    assert found.rejections.counts == {"file is missing": 3, "not an object": 1}
    assert list(found.rejections.lines()) == [
        b'{"file": "r.json", "record": 0, "path": "", "reason": "not an object", "detail": "str"}',
        b'{"file": "r.json", "record": 2, "path": "gone", "reason": "file is missing", "detail": ""}',
        b'{"file": "r.json", "record": 3, "path": "gone", "reason": "file is missing", "detail": ""}',
        b'{"file": "z.json", "record": 7, "path": "gone", "reason": "file is missing", "detail": ""}',
    ]
    found.rejections.add(Rejection("r.json", 1, "x", "cut short"))  # after all: it turned out when it was decoded
    assert [json.loads(line)["record"] for line in found.rejections.lines()] == [0, 1, 2, 3, 7]


def test_a_record_about_a_file_that_nobody_looked_at_is_found(tmp_path: Path) -> None:
    for new in ("new", "passed-over"):
        with pytest.raises(JsonChanged):
            gather(tmp_path, [record(0, new)], {"x": "a"}, passed_over=("passed-over",))
