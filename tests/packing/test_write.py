"""Writing a shard: what plain tar readers find, offsets, dropped questions, and never a half-written file."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from mellow_ds.packing.question_file import QuestionWriter, StoredQuestion, read_questions
from mellow_ds.packing.shard_file import published
from mellow_ds.packing.shard_plan import AudioForm, PlannedClip, ShardPlan
from mellow_ds.packing.survey import content_key
from mellow_ds.packing.write import ShardNote, read_note, write_shard
from mellow_ds.shard_format import Question, SampleInfo, index_name, sample_checksum


def plan_of(corpus: Any, questions: dict[str, list[tuple[str, ...]]], codec: str = "flac") -> ShardPlan:
    """A plan for the files of `questions`, each with the questions (ids) that stand with it and their other clips."""
    keys = {name: content_key((corpus.root / name).read_bytes()) for name in questions}
    clips = []
    with QuestionWriter(corpus.folder / "questions", len(questions)) as file:
        for place, (name, asked) in enumerate(questions.items()):
            for number, others in enumerate(asked):
                about = (keys[name], *(keys[other] for other in others))
                numbers = tuple(range(len(about)))
                file.add(
                    place,
                    StoredQuestion(0, number, numbers, f"{name}-{number}", about, "tone?", "yes", "binary", "", ()),
                )
            clips.append(PlannedClip(keys[name], name, file.span(place)))
    return ShardPlan("shard-000000.tar", tuple(sorted(clips, key=lambda clip: clip.key)), AudioForm(32_000, codec))


def questions_of(corpus: Any, clip: PlannedClip) -> tuple[Question, ...]:
    with (corpus.folder / "questions").open("rb", buffering=0) as file:
        return tuple(stored.question for stored in read_questions(file, clip.questions))


def write(corpus: Any, plan: ShardPlan) -> ShardNote:
    out = corpus.folder / "out"
    out.mkdir(exist_ok=True)
    return write_shard(plan, "1.0", corpus.folder / "questions", corpus.root, out, lambda: None)


@pytest.mark.parametrize(("codec", "extension"), [("flac", "flac"), ("pcm", "wav")])
def test_plain_webdataset_reads_what_was_planned(corpus: Any, codec: str, extension: str) -> None:
    for number, name in enumerate("abc"):
        corpus.tone(f"{name}.wav", seconds=0.02 + 0.01 * number)
    plan = plan_of(corpus, {"a.wav": [(), ("b.wav",)], "b.wav": [], "c.wav": [()]}, codec)
    note = write(corpus, plan)
    path = corpus.folder / "out" / plan.name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [clip.key for clip in plan.clips]
    for sample, clip in zip(samples, plan.clips, strict=True):
        info = SampleInfo.from_json(sample["json"], "here")
        assert (info.key, info.source, info.sample_rate, info.questions) == (
            clip.key,
            clip.source,
            32_000,
            questions_of(corpus, clip),
        )
        stored, rate = soundfile.read(io.BytesIO(sample[extension]))
        original, _ = soundfile.read(corpus.root / clip.source)
        assert (rate, len(stored)) == (32_000, info.num_frames)
        np.testing.assert_allclose(stored[::4][20:-20], original[20:-20], atol=2e-3)
    assert note.info is not None
    assert (note.info.num_samples, note.info.num_questions) == (3, 3)
    assert note.info.num_bytes == path.stat().st_size


@pytest.mark.parametrize("codec", ["flac", "pcm"])
def test_the_index_gives_exactly_the_bytes_of_the_members(corpus: Any, codec: str) -> None:
    for number, name in enumerate("abcdef"):
        corpus.tone(f"{name}.wav", seconds=0.02 + 0.01 * number)
    plan = plan_of(corpus, {f"{name}.wav": [()] * (number + 1) for number, name in enumerate("abcdef")}, codec)
    write(corpus, plan)
    path = corpus.folder / "out" / plan.name
    rows = np.load(corpus.folder / "out" / index_name(plan.name), allow_pickle=False)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert len(rows) == 6
    for number, row in enumerate(rows):
        audio = whole[row["audio_offset"] :][: row["audio_bytes"]]
        info = whole[row["json_offset"] :][: row["json_bytes"]]
        key = row["key"].decode()
        extension = "flac" if codec == "flac" else "wav"
        assert members[2 * number] == (f"{key}.{extension}", audio)
        assert members[2 * number + 1] == (f"{key}.json", info)
        assert row["checksum"] == sample_checksum(audio, info)
        content = json.loads(info)
        assert (row["num_frames"], row["num_questions"]) == (content["num_frames"], len(content["questions"]))


def test_times_owners_and_modes_are_fixed(corpus: Any) -> None:
    corpus.tone("a.wav")
    plan = plan_of(corpus, {"a.wav": [()]})
    write(corpus, plan)
    with tarfile.open(corpus.folder / "out" / plan.name) as tar:
        found = {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert found == {(0, 0o644, 0, 0, "mellow", "mellow")}


def test_a_clip_that_turns_out_bad_takes_its_questions_with_it(corpus: Any) -> None:
    for name in ("good", "lonely", "asks-bad"):
        corpus.tone(f"{name}.wav", hertz=200 + 10 * len(name))
    samples = np.zeros(100, dtype=np.float32)
    samples[50] = np.nan
    soundfile.write(corpus.root / "bad.wav", samples, 8_000, subtype="FLOAT")
    plan = plan_of(
        corpus,
        {
            "good.wav": [(), ("bad.wav",)],
            "lonely.wav": [],
            "asks-bad.wav": [("bad.wav", "lonely.wav")],
            "bad.wav": [()],
        },
    )
    note = write(corpus, plan)
    keys = {clip.source: clip.key for clip in plan.clips}
    with tarfile.open(corpus.folder / "out" / plan.name) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    key = keys["good.wav"]
    assert set(members) == {f"{key}.flac", f"{key}.json"}, "clips that nothing asks about any more go too"
    assert [question.id for question in SampleInfo.from_json(members[f"{key}.json"], "").questions] == ["good.wav-0"]
    assert {bad: reason for bad, (reason, _) in note.bad.items()} == {keys["bad.wav"]: "samples are not finite"}


def test_a_shard_of_bad_clips_only_has_a_note_and_no_tar(corpus: Any) -> None:
    (corpus.root / "bad.wav").write_text("no audio")
    note = write(corpus, plan_of(corpus, {"bad.wav": [()]}))
    assert note.info is None
    assert [path.name for path in (corpus.folder / "out").iterdir()] == ["shard-000000.done.json"]


def test_a_file_that_changed_since_it_was_hashed_is_not_packed_under_the_old_key(corpus: Any) -> None:
    corpus.tone("a.wav")
    plan = plan_of(corpus, {"a.wav": [()]})
    corpus.tone("a.wav", hertz=999)
    assert [reason for reason, _ in write(corpus, plan).bad.values()] == ["changed while it was packed"]


def test_the_note_comes_back_as_it_was_and_a_broken_one_counts_as_none(corpus: Any) -> None:
    corpus.tone("a.wav")
    note = write(corpus, plan_of(corpus, {"a.wav": [()]}))
    out = corpus.folder / "out"
    assert read_note(out, "shard-000000.tar") == note
    for broken in (
        "",
        "{}",
        '{"fingerprint": "x", "info": 3, "bad": {}}',
        '{"fingerprint": "x", "info": null, "bad": 3}',
    ):
        (out / "shard-000000.done.json").write_text(broken)
        assert read_note(out, "shard-000000.tar") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with published(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]
