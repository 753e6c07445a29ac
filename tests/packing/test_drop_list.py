"""The drop list: its form, and a build that keeps to it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing.build import run_build
from mellow_ds.packing.drop_list import NameSet, read_drop_list
from mellow_ds.packing.report import Report
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import content_key
from mellow_ds.shard_format import question_id


def write(folder: Path, *entries: Any) -> Path:
    path = folder / "drop.jsonl"
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def test_kinds_are_told_apart_and_blank_lines_passed_over(tmp_path: Path) -> None:
    clip, question = "0" * 32, "f" * 32
    path = write(tmp_path, {"kind": "clip", "id": clip, "reason": "silent"}, {"kind": "question", "id": question})
    path.write_text(path.read_text() + "\n\n")
    found = read_drop_list(path)
    assert [(len(names), clip in names, question in names) for names in (found.clips, found.questions)] == [
        (1, True, False),
        (1, False, True),
    ]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    nothing = read_drop_list(None)
    assert (len(nothing.clips), len(nothing.questions), nothing.sha256) == (0, 0, "")


def test_names_are_told_apart_to_their_last_digit() -> None:
    names = ["00" * 16, "ab" * 15 + "00", "ab" * 14 + "0000", "ab" * 16]  # zeros at the end are easily lost
    found = NameSet(bytes.fromhex("".join(names + names)))
    assert len(found) == 4
    assert sorted(found.place(name) for name in names) == [0, 1, 2, 3]  # type: ignore[type-var]
    assert "ab" * 15 + "01" not in found
    assert "00" * 16 not in NameSet()


@pytest.mark.parametrize(
    "line",
    [
        "text",
        "[]",
        '{"kind": "sound", "id": "00000000000000000000000000000000"}',
        '{"kind": "clip"}',
        '{"kind": "clip", "id": 3}',
        '{"kind": "clip", "id": "a.wav"}',
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, {"kind": "clip", "id": "0" * 32})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(PackingError, match=r"drop\.jsonl, line 2.*"):
        read_drop_list(path)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"gone\.jsonl cannot be read .*--drop-list"):
        read_drop_list(tmp_path / "gone.jsonl")


def build(corpus: Any, **settings: Any) -> Report:
    settings = {"workers": 1, **settings}
    return run_build([corpus.write()], corpus.root, corpus.folder / "out", BuildSettings(**settings))


def test_what_is_listed_is_left_out_and_counted_apart(corpus: Any) -> None:
    corpus.ask_tones(4)  # each asked about alone and with the next
    corpus.ask("tone-000.wav", answer="tone 0")  # says the same as the first record
    keys = [content_key((corpus.root / f"tone-{number:03d}.wav").read_bytes()) for number in range(4)]
    repeated = question_id((keys[0],), "is it a tone?", "tone 0", "binary", 0)
    drops = [{"kind": "clip", "id": keys[2], "reason": "silent"}, {"kind": "question", "id": repeated, "reason": "x"}]
    drop_list = write(corpus.folder, *drops, {"kind": "clip", "id": "0" * 32, "reason": "of another corpus"})
    report = build(corpus, drop_list=drop_list, max_rejected=0)
    assert report.dropped == {"clip": 3, "question": 1}
    assert (report.rejected, report.manifest.num_clips, report.manifest.num_questions) == ({}, 3, 5)
    assert report.manifest.sources["drop_list"] == read_drop_list(drop_list).sha256
    assert build(corpus, drop_list=drop_list).was_finished
    with pytest.raises(PackingError, match="differs in --drop-list"):
        build(corpus)
    write(corpus.folder, *drops[:1])
    with pytest.raises(PackingError, match="differs in --drop-list"):
        build(corpus, drop_list=drop_list)
    report = build(corpus, drop_list=drop_list, overwrite=True)
    assert (report.dropped, report.manifest.num_questions) == ({"clip": 3}, 6)


def test_a_dropped_clip_is_not_even_decoded(corpus: Any) -> None:
    corpus.ask_tones(2, pairs=False)
    corpus.tone("half.mp3", seconds=1, rate=44_100)
    (corpus.root / "half.mp3").write_bytes((corpus.root / "half.mp3").read_bytes()[:3_000])
    corpus.ask("half.mp3")
    key = content_key((corpus.root / "half.mp3").read_bytes())
    with pytest.raises(PackingError, match="1 of 3 records"):
        build(corpus, max_rejected=0)
    assert build(corpus, max_rejected=0, drop_list=write(corpus.folder, {"kind": "clip", "id": key})).rejected == {}


def test_a_list_that_leaves_nothing_is_named(corpus: Any) -> None:
    corpus.ask_tones(1, pairs=False)
    key = content_key((corpus.root / "tone-000.wav").read_bytes())
    with pytest.raises(PackingError, match=r"drop\.jsonl leaves no question"):
        build(corpus, drop_list=write(corpus.folder, {"kind": "clip", "id": key}))


def test_a_list_of_another_corpus_is_refused_and_one_that_fits_in_part_is_named(
    corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    corpus.ask_tones(2, pairs=False)
    foreign = {"kind": "clip", "id": "0" * 32}
    with pytest.raises(PackingError, match=r"1 of 1 entries of \S+drop\.jsonl name nothing in these records"):
        build(corpus, drop_list=write(corpus.folder, foreign))
    key = content_key((corpus.root / "tone-000.wav").read_bytes())
    build(corpus, drop_list=write(corpus.folder, foreign, {"kind": "clip", "id": key}))
    assert "1 of 2 entries of" in caplog.text
