"""Questions from records: content ids, repeated records, records with a bad clip."""

from mellow_ds.packing.decode import BadClip, Header
from mellow_ds.packing.question_set import gather_questions
from mellow_ds.packing.records import JsonSource, Record, RecordSet, Rejection
from mellow_ds.packing.survey import SourceClip, Survey
from mellow_ds.shard_format import question_id


def record(number: int, *paths: str, answer: str = "yes") -> Record:
    return Record("r.json", number, paths, (), "tone?", answer, "binary", "test")


def survey(good: dict[str, str], bad: tuple[str, ...] = ()) -> Survey:
    clips = {key: SourceClip(key, path, Header(8_000, 1, 400)) for path, key in good.items()}
    return Survey(clips, good, {path: BadClip("file is missing") for path in bad})


def records(*given: Record) -> RecordSet:
    return RecordSet(list(given), [], (JsonSource("r.json", "", len(given)),))


def test_ids_are_content_hashes_and_tell_repetitions_apart() -> None:
    found = gather_questions(
        records(record(0, "a", "b"), record(1, "a", "b"), record(2, "b", "a"), record(3, "a", "b")),
        survey({"a": "k1", "b": "k2"}),
    )
    assert list(found.questions) == [
        question_id(("k1", "k2"), "tone?", "yes", "binary", 0),
        question_id(("k1", "k2"), "tone?", "yes", "binary", 1),
        question_id(("k2", "k1"), "tone?", "yes", "binary", 0),
        question_id(("k1", "k2"), "tone?", "yes", "binary", 2),
    ]
    assert [found.record_of[name].number for name in found.questions] == [0, 1, 2, 3]


def test_a_bad_clip_takes_all_its_records_out() -> None:
    found = gather_questions(
        records(record(0, "a"), record(1, "a", "gone"), record(2, "gone")), survey({"a": "k1"}, bad=("gone",))
    )
    assert [found.record_of[name].number for name in found.questions] == [0]
    assert found.rejections == [
        Rejection("r.json", 1, "gone", "file is missing"),
        Rejection("r.json", 2, "gone", "file is missing"),
    ]


def test_a_question_can_be_rejected_later() -> None:
    keys = {"a": "k1", "b": "k2"}
    found = gather_questions(records(record(0, "a", "b"), record(1, "a")), survey(keys))
    pair = next(iter(found.questions))
    found.reject(pair, keys, "k2", "cut short", "9 frames of 10")
    assert found.rejections == [Rejection("r.json", 0, "b", "cut short", "9 frames of 10")]
    assert [found.record_of[name].number for name in found.questions] == [1]
