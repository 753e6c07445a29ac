"""Records: both forms become one, whatever cannot be used is rejected with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing.records import read_records

GOOD = {"filepath1": "a.wav", "input": "what is it?", "answer": "a tone"}


def write(folder: Path, content: Any, name: str = "records.json") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_both_forms_give_the_same_record(tmp_path: Path) -> None:
    texts = {"input": "same?", "answer": "no", "subtype": "pair", "taskname": "t"}
    old = {"filepath1": "x\\a.wav", "filepath2": "./x/b.wav", "caption1": "one", "caption2": "two", **texts}
    new = {"clips": ["x/a.wav", "x//b.wav"], "captions": ["one", "two"], **texts}
    first, second = read_records([write(tmp_path, [old, new])]).records
    assert first.paths == second.paths == ("x/a.wav", "x/b.wav")
    assert first.captions == second.captions == ("one", "two")
    assert (first.input, first.answer, first.subtype, first.taskname) == ("same?", "no", "pair", "t")
    assert (first.number, second.number, first.file) == (0, 1, "records.json")


def test_one_and_three_clips_go_the_same_way(tmp_path: Path) -> None:
    single = {**GOOD, "filepath2": "", "caption1": "", "caption2": "not of a clip"}
    triple = {"clips": ["a.wav", "b.wav", "a.wav"], "input": "which?", "answer": "b"}
    one, three = read_records([write(tmp_path, [single, triple])]).records
    assert (one.paths, one.captions) == (("a.wav",), ())
    assert (three.paths, three.captions) == (("a.wav", "b.wav", "a.wav"), ())


def test_a_missing_subtype_is_the_taskname(tmp_path: Path) -> None:
    records = read_records([write(tmp_path, [GOOD, {**GOOD, "taskname": "t"}, {**GOOD, "subtype": None}])]).records
    assert [record.subtype for record in records] == ["", "t", ""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filepath1": None}, "filepath1 is missing"),
        ({"input": None}, "input is missing"),
        ({"answer": None}, "answer is missing"),
        ({"input": "  "}, "input is empty"),
        ({"answer": " "}, "answer is empty"),
        ({"input": ["a"]}, "input is not text"),
        ({"answer": 3}, "answer is not text"),
        ({"answer": "\ud800"}, "answer is not Unicode text"),
        ({"filepath1": ""}, "path is empty"),
        ({"filepath1": "./"}, "path is empty"),
        ({"filepath1": "/etc/passwd"}, "path leaves the audio root"),
        ({"filepath1": "../a.wav"}, "path leaves the audio root"),
        ({"filepath1": "x/../../a.wav"}, "path leaves the audio root"),
        ({"filepath1": "x\\..\\..\\a.wav"}, "path leaves the audio root"),
        ({"filepath1": "\\\\host\\share\\a.wav"}, "path leaves the audio root"),
        ({"filepath1": "C:\\a.wav"}, "path leaves the audio root"),
        ({"filepath2": "../b.wav"}, "path leaves the audio root"),
        ({"filepath1": "a\0.wav"}, "path is not a file name"),
        ({"clips": []}, "number of clips"),
        ({"clips": ["a.wav"] * 100}, "number of clips"),
        ({"clips": "a.wav"}, "clips is not a list"),
        ({"clips": ["a.wav", 2]}, "clips is not text"),
        ({"clips": ["a.wav"], "captions": ["one", "two"]}, "captions do not match clips"),
    ],
)
def test_a_record_that_cannot_be_used_is_rejected_by_name(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    found = read_records([write(tmp_path, [GOOD, {**GOOD, **change}, GOOD])])
    assert [record.number for record in found.records] == [0, 2]
    assert [(bad.file, bad.record, bad.reason) for bad in found.rejections] == [("records.json", 1, reason)]
    assert found.num_records == 3


def test_an_entry_that_is_no_object_is_rejected(tmp_path: Path) -> None:
    found = read_records([write(tmp_path, [GOOD, "text", None])])
    assert [(bad.record, bad.reason, bad.detail) for bad in found.rejections] == [
        (1, "not an object", "str"),
        (2, "not an object", "NoneType"),
    ]


@pytest.mark.parametrize(
    ("prompt", "captions", "is_good"),
    [
        ("caption first audio", ["a dog"], True),
        ("Caption Both Audios", ["a dog", "a cat"], True),
        ("caption both audios", ["a dog", " "], False),
        ("caption second audio", ["a dog"], False),
        ("caption first audio", None, False),
        ("explain the difference in detail", ["a dog", "a cat"], False),
        ("what is it?", ["a dog"], False),
    ],
)
def test_an_answer_may_be_empty_where_captions_answer(
    tmp_path: Path, prompt: str, captions: list[str] | None, is_good: bool
) -> None:
    clips = [f"{number}.wav" for number in range(len(captions or "x"))]
    found = read_records([write(tmp_path, [{"clips": clips, "captions": captions, "input": prompt, "answer": ""}])])
    assert len(found.records) == is_good
    assert [bad.reason for bad in found.rejections] == ([] if is_good else ["answer is empty"])


@pytest.mark.parametrize("content", ["{}", '{"data": []}', "3", "null", "[1, 2]", "not json", "[" * 100_000, ""])
def test_json_that_is_no_list_of_records_is_refused_by_file(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(PackingError, match=r"records\.json .*list of records"):
        read_records([path])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"nowhere\.json cannot be read"):
        read_records([tmp_path / "nowhere.json"])
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(PackingError, match=r"latin\.json is not JSON"):
        read_records([tmp_path / "latin.json"])


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(read_records([path]).records) == 1


def test_files_of_one_name_are_told_apart_and_none_is_given_twice(tmp_path: Path) -> None:
    paths = [write(tmp_path, [GOOD], "a/train.json"), write(tmp_path, [{**GOOD, "input": "?"}], "b/train.json")]
    found = read_records(paths)
    assert [source.name for source in found.sources] == ["a/train.json", "b/train.json"]
    assert [record.file for record in found.records] == ["a/train.json", "b/train.json"]
    with pytest.raises(PackingError, match="given twice"):
        read_records([paths[0], tmp_path / "b" / ".." / "a" / "train.json"])
