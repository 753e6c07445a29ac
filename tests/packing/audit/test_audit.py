"""The audit finds what was planted in a small corpus, and nothing else."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.audit.findings import AuditReport, audit_shards
from mellow_ds.packing.audit.report import drop_lines, format_report, report_as_json, write_drop_list
from mellow_ds.packing.audit.settings import DEFAULT_DROP, AuditSettings
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.survey import content_key
from mellow_ds.shard_format import MANIFEST_NAME, SampleInfo, index_name, read_index, read_manifest, sample_checksum

RATE = 8_000
PROMPT = "which is it? a) a bell b) a siren c) a dog d) a car"


def noise(seed: int, amplitude: float = 0.3, seconds: float = 0.2) -> np.ndarray:
    """White noise of its own."""
    return amplitude * np.random.default_rng(seed).uniform(-1, 1, round(seconds * RATE))


def build(corpus: Any, name: str, **settings: Any) -> Path:
    """A shard folder of the records so far, which are then forgotten."""
    out = corpus.folder / name
    given = {"workers": 1, "sample_rate": RATE, "shard_megabytes": 0.01, **settings}
    build_shards([corpus.write(f"{name}.json")], corpus.root, out, **given)
    corpus.records.clear()
    return out


def add(corpus: Any, name: str, wave: np.ndarray, **fields: Any) -> str:
    """A sound with one question; returns the key that its clip will have."""
    path = corpus.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole numbers: from floats libsndfile rounds otherwise for WAV than for FLAC
    soundfile.write(path, np.rint(np.clip(wave * 32768, -32768, 32767)).astype(np.int16), RATE, subtype="PCM_16")
    corpus.ask(name, **{"input": f"is it {name}?", **fields})
    return content_key(path.read_bytes())


def overwrite_texts(folder: Path, changes: dict[str, dict[str, str]]) -> None:
    """Give questions of a one-shard folder other texts, which no build would let in, by what they ask now."""
    shard = read_manifest(folder).shards[0]
    old, rows = (folder / shard.name).read_bytes(), read_index(folder, shard)
    with tarfile.open(folder / shard.name, "w") as tar:
        for row in rows:
            audio, text = (old[int(row[f"{part}_offset"]) :][: int(row[f"{part}_bytes"])] for part in ("audio", "json"))
            info = SampleInfo.from_json(text, "")
            questions = tuple(dataclasses.replace(q, **changes.get(q.input, {})) for q in info.questions)
            text = dataclasses.replace(info, questions=questions).to_json()
            for part, extension, payload in (("audio", "flac", audio), ("json", "json", text)):
                member = tarfile.TarInfo(f"{info.key}.{extension}")
                member.size = len(payload)
                row[f"{part}_offset"], row[f"{part}_bytes"] = tar.offset + 512, len(payload)
                tar.addfile(member, io.BytesIO(payload))
            row["checksum"] = sample_checksum(audio, text)
    np.save(folder / index_name(shard.name), rows)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    tar_bytes, index_bytes = ((folder / name).read_bytes() for name in (shard.name, index_name(shard.name)))
    content["shards"][0].update(
        num_bytes=len(tar_bytes),
        sha256=hashlib.sha256(tar_bytes).hexdigest(),
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
    )
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def found(report: AuditReport, kind: str, split: str = "train") -> list[str]:
    (one,) = [one for one in report.findings if (one.kind, one.split) == (kind, split)]
    return [key.decode() for key in one.ids.tolist()]


@pytest.fixture
def clean(corpus: Any) -> Any:
    """Eight sounds with a question each, and a pair."""
    for number in range(8):
        add(corpus, f"clean-{number}.wav", noise(number))
    corpus.ask("clean-0.wav", "clean-1.wav", input="same?", answer="no", subtype="pair")
    return corpus


def test_a_clean_corpus_has_no_findings(clean: Any) -> None:
    report = audit_shards({"train": build(clean, "train")})
    assert not [one.kind for one in report.findings if len(one.ids)]
    assert not report.is_serious
    assert report.coverage == {"binary": {"train": 8}, "pair": {"train": 1}}
    (split,) = report.splits
    assert (split.num_clips, split.num_questions) == (8, 9)
    assert split.seconds == pytest.approx(8 * 0.2)


def test_audio_that_is_silent_clipped_or_there_twice_is_found(clean: Any) -> None:
    quiet = add(clean, "quiet.wav", noise(20, 10 ** (-52 / 20)))
    click = noise(21, 10 ** (-80 / 20))
    click[100] = 0.5  # 1 sample of 1,600 at half scale: RMS -38 dBFS, not silent
    add(clean, "click.wav", click)
    clipped = add(clean, "clipped.wav", np.clip(noise(22, 1.2), -1, 1))
    twins = {
        add(clean, "twin.wav", noise(23), answer="one"),
        add(clean, "twin.flac", noise(23), answer="two"),  # another file, the same samples
    }
    clean.ask("twin.flac", input="and more?", answer="two")
    kept = content_key((clean.root / "twin.flac").read_bytes())  # it has more questions
    report = audit_shards({"train": build(clean, "train")})
    assert found(report, "silent") == [quiet]
    assert found(report, "clipped") == [clipped]
    assert found(report, "duplicate") == sorted(twins - {kept})
    lines = list(drop_lines(report, "train", DEFAULT_DROP))
    assert {line["id"] for line in lines} == {quiet, *twins} - {kept}
    assert {line["kind"] for line in lines} == {"clip"}
    assert f"duplicate: same audio as {kept}" in [line["reason"] for line in lines]
    assert report.is_serious


def test_the_thresholds_are_those_given(clean: Any) -> None:
    key = add(clean, "quiet.wav", noise(20, 0.01))  # peak just under -40 dBFS, RMS -44.8
    shards = build(clean, "train")
    for settings, wanted in (
        (AuditSettings(silent_peak=-39.9), [key]),
        (AuditSettings(silent_peak=-40.5), []),
        (AuditSettings(silent_rms=-44), [key]),
        (AuditSettings(silent_rms=-46), []),
    ):
        assert found(audit_shards({"train": shards}, settings), "silent") == wanted


def test_texts_that_are_empty_repeated_or_too_long_are_found(clean: Any) -> None:
    add(clean, "a.wav", noise(30))
    add(clean, "b.wav", noise(31))
    add(clean, "c.wav", noise(32), input="caption first audio", answer="", caption1="a bell rings")  # not empty
    add(clean, "d.wav", noise(33), input="word " * 12)
    add(clean, "e.wav", noise(34), answer="word " * 7)
    clean.ask("e.wav", input="is it e.wav?", answer="WORD  " + "word " * 6)
    train = build(clean, "train", shard_megabytes=256)
    overwrite_texts(train, {"is it a.wav?": {"input": " "}, "is it b.wav?": {"answer": ""}})
    report = audit_shards({"train": train}, AuditSettings(ip_text_len=11, op_text_len=6))
    counts = {one.kind: len(one.ids) for one in report.findings if len(one.ids)}
    assert counts == {"empty": 2, "long-prompt": 1, "long-answer": 3, "repeated-question": 1}
    lengths = {one.text: one.values for one in report.lengths}
    assert lengths["prompt"][0] == 0
    assert lengths["prompt"][3] == 12
    assert lengths["answer"][3] == 7


def test_options_that_cannot_be_read_are_found_in_multiple_choice_alone(clean: Any) -> None:
    for number in range(4):
        answer = "abcd"[number] + ") " + ["a bell", "a siren", "a dog", "a car"][number]
        clean.ask(f"clean-{number}.wav", input=PROMPT, answer=answer, subtype="which")
    clean.ask("clean-4.wav", input=PROMPT, answer="a cat", subtype="which")
    clean.ask("clean-5.wav", input="which is it?", answer="a cat", subtype="which")  # most others have options
    clean.ask("clean-6.wav", input="which is it?", answer="a cat", subtype="Bell-MCQ")  # says so itself
    clean.ask("clean-7.wav", input="is this a) clear or b) not?", answer="maybe", subtype="binary")  # one of many
    report = audit_shards({"train": build(clean, "train")})
    (failed,) = [one for one in report.findings if one.kind == "options"]
    assert sorted(failed.reasons) == [
        "multiple choice without lettered options",
        "multiple choice without lettered options",
        "the answer names none of the options",
    ]
    (letters,) = report.letters
    assert letters.counts == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert letters.far_above == ()


def test_a_letter_that_is_right_too_often_is_named(clean: Any) -> None:
    for number in range(80):
        letter = "b" if number % 2 else "acd"[number // 2 % 3]
        text = {"a": "a bell", "b": "a siren", "c": "a dog", "d": "a car"}[letter]
        clean.ask(f"clean-{number % 8}.wav", input=f"number {number}: {PROMPT}", answer=f"{letter}) {text}")
    report = audit_shards({"train": build(clean, "train")})
    (letters,) = report.letters
    assert letters.counts == {"a": 14, "b": 40, "c": 13, "d": 13}
    assert letters.expected == {"a": 20, "b": 20, "c": 20, "d": 20}
    assert letters.far_above == ("b",)
    assert '"b" is right far more often than its share' in format_report(report)


def test_what_splits_share_is_found_by_key_and_by_audio(clean: Any) -> None:
    by_audio = add(clean, "sub/again.wav", noise(50), input="what?", answer="noise")
    train = build(clean, "train")
    for number in (0, 1):
        clean.ask(f"clean-{number}.wav", input="new?", answer="yes")
    clean.ask("clean-0.wav", "clean-1.wav", input="SAME? ", answer="no", subtype="other")
    add(clean, "again.flac", noise(50), input="what?", answer="noise")
    add(clean, "own.wav", noise(51))
    val = build(clean, "val", sample_rate=RATE, codec="pcm")
    report = audit_shards({"train": train, "val": val})
    by_key = [content_key((clean.root / f"clean-{number}.wav").read_bytes()) for number in (0, 1)]
    assert found(report, "shared-clip") == sorted([*by_key, by_audio])
    assert len(found(report, "shared-question")) == 2  # the pair, and the one about the other file of the same sound
    (overlap,) = report.overlaps
    assert (overlap.clips_by_key, overlap.clips_by_audio, overlap.questions) == (2, 1, 2)
    reasons = {line["id"]: line["reason"] for line in drop_lines(report, "train", ["shared-clip"])}
    assert reasons[by_key[0]] == "shared-clip: also in val"
    assert reasons[by_audio] == "shared-clip: also in val, as another file with the same audio"
    assert not list(drop_lines(report, "val", DEFAULT_DROP))  # what is held out stays


def test_a_question_is_shared_in_another_codec_too(clean: Any) -> None:
    train = build(clean, "train")
    clean.records = json.loads((clean.folder / "train.json").read_text())
    val = build(clean, "val", codec="opus")
    report = audit_shards({"train": train, "val": val})
    assert len(found(report, "shared-clip")) == 8
    assert len(found(report, "shared-question")) == 9
    assert any("lossy" in note for note in report.notes)


def test_processes_and_shard_size_change_nothing(clean: Any) -> None:
    add(clean, "quiet.wav", noise(20, 1e-3))
    many, records = build(clean, "many"), json.loads((clean.folder / "many.json").read_text())
    clean.records = records
    one = build(clean, "one", shard_megabytes=256)
    assert len(read_manifest(many).shards) > 1
    reports = [
        report_as_json(audit_shards({"train": folder}, workers=workers)) for folder, workers in ((many, 2), (one, 1))
    ]
    for report in reports:
        report.pop("splits")
    assert reports[0] == reports[1]


def test_a_damaged_sample_is_a_finding_and_a_missing_tar_an_error(clean: Any) -> None:
    shards = build(clean, "train", shard_megabytes=256)
    shard = read_manifest(shards).shards[0]
    row = read_index(shards, shard)[2]
    content = bytearray((shards / shard.name).read_bytes())
    content[int(row["audio_offset"]) + 200] ^= 1
    (shards / shard.name).write_bytes(content)
    report = audit_shards({"train": shards})
    assert found(report, "damaged") == [row["key"].decode()]
    assert "checksum" in report.problems[0]
    assert "shard-000000.tar" in format_report(report)
    (shards / shard.name).unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        audit_shards({"train": shards})


def test_the_drop_list_has_the_form_that_build_takes(clean: Any, tmp_path: Path) -> None:
    add(clean, "quiet.wav", noise(20, 1e-3))
    train = build(clean, "train", shard_megabytes=256)
    overwrite_texts(train, {"same?": {"answer": ""}})
    report = audit_shards({"train": train})
    path = tmp_path / "new" / "drop.jsonl"
    assert write_drop_list(report, "train", DEFAULT_DROP, path) == (1, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"kind", "id", "reason"}] * 2
    assert [line["kind"] for line in lines] == ["clip", "question"]
    json.dumps(report_as_json(report), allow_nan=False)


def test_a_tokenizer_gives_lengths_in_tokens_with_end_of_text(clean: Any, tmp_path: Path) -> None:
    from mellow_ds.model.tokenizer import train_tokenizer

    train_tokenizer(["is it clean? yes no same"], 100).save_pretrained(tmp_path / "tokenizer")
    settings = AuditSettings(tokenizer=str(tmp_path / "tokenizer"), op_text_len=1)
    report = audit_shards({"train": build(clean, "train")}, settings)
    assert len(found(report, "long-answer")) == 9  # a word and end-of-text
    assert {one.text: one.values[0] for one in report.lengths} == {"prompt": 2, "answer": 2}  # "same", "?"
    with pytest.raises(PackingError, match=r"--tokenizer .*nowhere cannot be loaded"):
        audit_shards({"train": clean.folder / "train"}, AuditSettings(tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("change", [{"silent_peak": 3}, {"clipped_share": 2}, {"ip_text_len": 0}])
def test_thresholds_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PackingError, match=r"must be|is a share"):
        AuditSettings(**change)
