"""The whole build: what comes out, what is left out, and that it always comes out the same."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from mellow_ds.errors import PackingError
from mellow_ds.packing import build as build_module
from mellow_ds.packing.build import build_shards, run_build
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import content_key
from mellow_ds.shard_format import MANIFEST_NAME, SampleInfo, read_manifest

SMALL = 0.02  # megabytes of a shard that holds a few tones


def samples_of(out: Path) -> list[list[SampleInfo]]:
    """The JSON members by shard, as a plain tar reader finds them."""
    shards = []
    for path in sorted(out.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            shards.append([SampleInfo.from_json(tar.extractfile(m).read(), m.name) for m in members])  # type: ignore[union-attr]
    return shards


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def build(corpus: Any, out: str = "out", **settings: Any) -> Any:
    settings = {"workers": 1, "shard_megabytes": SMALL, **settings}
    return run_build([corpus.write()], corpus.root, corpus.folder / out, BuildSettings(**settings))


def test_every_question_is_packed_once_with_its_clips_beside_it(corpus: Any) -> None:
    corpus.ask_tones(12)
    report = build(corpus)
    shards = samples_of(corpus.folder / "out")
    assert len(shards) > 2
    questions = [question for shard in shards for sample in shard for question in sample.questions]
    assert len({question.id for question in questions}) == len(questions) == 24
    key_of = {path.name: content_key(path.read_bytes()) for path in corpus.root.iterdir()}
    wanted = {
        (tuple(key_of[record[f]] for f in ("filepath1", "filepath2") if record[f]), record["answer"])
        for record in corpus.records
    }
    assert {(question.clips, question.answer) for question in questions} == wanted
    for shard in shards:
        keys = {sample.key for sample in shard}
        for sample in shard:
            assert all(set(question.clips) <= keys for question in sample.questions)
            assert all(question.clips[0] == sample.key for question in sample.questions)
    homes = [sample.key for shard in shards for sample in shard if sample.questions]
    assert len(homes) == len(set(homes)) == 12, "a copy has no questions"
    num_stored = sum(map(len, shards))
    assert 12 < num_stored <= 12 + 2 * (len(shards) - 1) + 1
    assert report.replication == num_stored / 12


def test_the_manifest_counts_and_names_no_place_or_time(corpus: Any) -> None:
    corpus.ask_tones(5)
    report = build(corpus)
    manifest = read_manifest(corpus.folder / "out")
    assert manifest == report.manifest
    assert (manifest.num_clips, manifest.num_questions) == (5, 10)
    assert manifest.subtypes == {"binary": 5, "pair": 5}
    assert manifest.sources["json"][0]["name"] == "records.json"
    assert manifest.sources["json"][0]["num_records"] == 10
    assert str(corpus.folder) not in (corpus.folder / "out" / MANIFEST_NAME).read_text()
    assert sorted(path.name for path in (corpus.folder / "out").iterdir()) == sorted(
        ["manifest.json", "rejected.jsonl"]
        + [shard.name for shard in manifest.shards]
        + [shard.name.replace(".tar", ".index.npy") for shard in manifest.shards]
    )


def test_a_corpus_elsewhere_gives_the_same_bytes(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(6)
    build(corpus)
    moved = corpus.folder / "elsewhere"
    shutil.copytree(corpus.root, moved / "sounds")
    shutil.copy(corpus.write(), moved / "records.json")
    build_shards(
        [moved / "records.json"], moved / "sounds", moved / "out", workers=1, shard_megabytes=SMALL, max_rejected=0.5
    )
    assert folder_bytes(moved / "out") == folder_bytes(corpus.folder / "out")


def test_one_clip_under_two_names_is_stored_once(corpus: Any) -> None:
    shutil.copy(corpus.tone("b.wav"), corpus.root / "a.wav")
    corpus.ask("b.wav")
    corpus.ask("a.wav", answer="no")
    corpus.ask("a.wav", "b.wav", subtype="same")
    report = build(corpus)
    ((sample,),) = samples_of(corpus.folder / "out")
    assert sample.source == "a.wav"
    assert {question.clips for question in sample.questions} == {(sample.key,), (sample.key, sample.key)}
    assert (report.manifest.num_clips, report.replication) == (1, 1)


def test_three_clips_are_packed_like_two(corpus: Any) -> None:
    for name in "abc":
        corpus.tone(f"{name}.wav", hertz=100 + ord(name))
    corpus.records.append(
        {"clips": ["a.wav", "b.wav", "c.wav"], "captions": ["x", "y", "z"], "input": "odd one?", "answer": "c"}
    )
    build(corpus, shard_megabytes=0.0001)
    (shard,) = samples_of(corpus.folder / "out")
    (question,) = [question for sample in shard for question in sample.questions]
    assert set(question.clips) == {sample.key for sample in shard}
    assert question.captions == ("x", "y", "z")


def make_every_fault(corpus: Any) -> dict[int, str]:
    """Records with every kind of fault among good ones; the reasons by record number."""
    faults: dict[int, str] = {}

    def bad(reason: str, *clips: str, **fields: Any) -> None:
        faults[len(corpus.records)] = reason
        corpus.ask(*clips, **fields)

    corpus.tone("good.wav")
    corpus.ask("good.wav")
    bad("file is missing", "gone.wav")
    bad("file is missing", "good.wav", "gone.wav")
    (corpus.root / "empty.wav").touch()
    bad("file is empty", "empty.wav")
    (corpus.root / "text.wav").write_text("no audio" * 100)
    bad("cannot be decoded", "text.wav")
    soundfile.write(corpus.root / "none.wav", np.zeros(0), 8_000)
    bad("no samples", "none.wav")
    soundfile.write(corpus.root / "nan.wav", np.full(50, np.nan, dtype=np.float32), 8_000, subtype="FLOAT")
    bad("samples are not finite", "nan.wav")
    bad("samples are not finite", "good.wav", "nan.wav")
    whole = corpus.tone("half.wav", seconds=1).read_bytes()
    (corpus.root / "half.wav").write_bytes(whole[: len(whole) // 2])
    bad("cut short", "half.wav")
    (corpus.root / "half.mp3").write_bytes(corpus.tone("half.mp3", seconds=1, rate=44_100).read_bytes()[:3_000])
    bad("cut short", "half.mp3")
    corpus.tone("many.wav", channels=40)
    bad("too many channels", "many.wav")
    corpus.tone("slow.wav", rate=500)
    bad("sample rate out of bounds", "slow.wav")
    bad("path leaves the audio root", "../records.json")
    bad("path leaves the audio root", "/etc/hostname")
    bad("answer is empty", "good.wav", answer="")
    bad("input is missing", "good.wav", input=None)
    faults[len(corpus.records)] = "not an object"
    corpus.records.append("text")
    corpus.ask("good.wav", answer="at the end")
    return faults


def test_every_kind_of_fault_is_named_and_counted(corpus: Any) -> None:
    faults = make_every_fault(corpus)
    report = build(corpus, max_rejected=0.95)
    lines = rejected(corpus.folder / "out")
    assert {line["record"]: line["reason"] for line in lines} == faults
    assert [line["record"] for line in lines] == sorted(faults)
    assert all(line["file"] == "records.json" for line in lines)
    assert {line["path"] for line in lines if line["reason"] == "samples are not finite"} == {"nan.wav"}
    assert report.rejected["file is missing"] == 2
    assert sum(report.rejected.values()) == len(faults)
    assert report.manifest.num_questions == 2
    assert str(corpus.folder) not in (corpus.folder / "out" / "rejected.jsonl").read_text()


def test_too_many_rejected_fail_before_the_manifest(corpus: Any) -> None:
    corpus.ask_tones(9, pairs=False)
    corpus.ask("gone.wav")
    with pytest.raises(PackingError, match=r"1 of 10 records .*10\.00%.*1 x file is missing.*rejected\.jsonl"):
        build(corpus)
    assert not (corpus.folder / "out" / MANIFEST_NAME).exists()
    assert [line["path"] for line in rejected(corpus.folder / "out")] == ["gone.wav"]
    assert build(corpus, max_rejected=0.1).manifest.num_questions == 9
    with pytest.raises(PackingError, match="1 of 10 records"):
        build(corpus, max_rejected=0.05)  # the finished build is not within what is allowed now


def test_clips_that_turn_out_bad_when_decoded_count_too(corpus: Any) -> None:
    corpus.ask_tones(6, pairs=False)
    soundfile.write(corpus.root / "nan.wav", np.full(50, np.nan, dtype=np.float32), 8_000, subtype="FLOAT")
    corpus.ask("nan.wav")
    with pytest.raises(PackingError, match=r"1 of 7 records .*not finite"):
        build(corpus)
    assert not (corpus.folder / "out" / MANIFEST_NAME).exists()
    report = build(corpus, max_rejected=0.2)
    assert report.manifest.num_questions == 6
    assert report.num_reused > 1, "what was packed before the build failed is taken over"


def test_shards_that_come_out_empty_leave_no_gap(corpus: Any) -> None:
    for number in range(6):
        samples = np.full(3_000, np.nan, dtype=np.float32)
        samples[0] = number
        soundfile.write(corpus.root / f"nan-{number}.wav", samples, 8_000, subtype="FLOAT")
        corpus.ask(f"nan-{number}.wav")
    corpus.ask_tones(6, pairs=False)
    report = build(corpus, max_rejected=0.6, shard_megabytes=0.001)
    assert [shard.name for shard in report.manifest.shards] == [f"shard-{number:06d}.tar" for number in range(6)]
    assert len(samples_of(corpus.folder / "out")) == 6


def test_nothing_usable_is_a_failure_whatever_is_allowed(corpus: Any) -> None:
    corpus.ask("gone.wav")
    with pytest.raises(PackingError, match="1 of 1 records"):
        build(corpus, max_rejected=1.0)
    corpus.records.clear()
    with pytest.raises(PackingError, match="no record"):
        build(corpus)


def test_a_missing_audio_root_is_named(corpus: Any) -> None:
    corpus.ask("a.wav")
    with pytest.raises(PackingError, match=r"nowhere is not a folder.*--audio-root"):
        run_build([corpus.write()], corpus.folder / "nowhere", corpus.folder / "out", BuildSettings())


def test_a_finished_build_is_left_as_it_is(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(5)
    build(corpus)
    before = folder_bytes(corpus.folder / "out")
    times = {path: path.stat().st_mtime_ns for path in (corpus.folder / "out").iterdir()}
    assert build(corpus).was_finished
    for path in corpus.root.iterdir():  # written anew with the same content: seen by hashing, not by time
        path.write_bytes(path.read_bytes())
    assert build(corpus).was_finished
    assert folder_bytes(corpus.folder / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (corpus.folder / "out").iterdir()} == times


def test_a_damaged_finished_build_is_made_anew(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(5)
    build(corpus)
    before = folder_bytes(corpus.folder / "out")
    os.truncate(corpus.folder / "out" / "shard-000000.tar", 1_000)
    assert not build(corpus).was_finished
    assert folder_bytes(corpus.folder / "out") == before


def test_another_input_is_refused_unless_told_to_overwrite(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(8)
    build(corpus)
    before = folder_bytes(corpus.folder / "out")
    for other, named in (({"codec": "pcm"}, "--codec"), ({"sample_rate": 16_000}, "--sample-rate")):
        with pytest.raises(PackingError, match=f"differs in .*{named}.*--overwrite"):
            build(corpus, **other)
    corpus.tone("tone-000.wav", hertz=999)  # of the same size
    with pytest.raises(PackingError, match="differs in audio files"):
        build(corpus)
    assert folder_bytes(corpus.folder / "out") == before
    corpus.records = corpus.records[:4]
    report = build(corpus, overwrite=True)
    assert report.manifest.num_questions == 4
    fresh = build(corpus, out="fresh")
    assert fresh.manifest == report.manifest
    assert folder_bytes(corpus.folder / "fresh") == folder_bytes(corpus.folder / "out"), "stale shards are gone"


def test_an_overwriting_build_that_fails_leaves_the_old_one(corpus: Any) -> None:
    corpus.ask_tones(5)
    manifest = build(corpus).manifest
    soundfile.write(corpus.root / "nan.wav", np.full(50, np.nan, dtype=np.float32), 8_000, subtype="FLOAT")
    corpus.ask("nan.wav")
    with pytest.raises(PackingError, match="cannot be packed"):
        build(corpus, overwrite=True)
    assert read_manifest(corpus.folder / "out") == manifest
    assert len(samples_of(corpus.folder / "out")) == len(manifest.shards)


def test_a_manifest_of_another_version_is_named(corpus: Any) -> None:
    corpus.ask_tones(2)
    build(corpus)
    path = corpus.folder / "out" / MANIFEST_NAME
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(PackingError, match=r"version 99.*--overwrite"):
        build(corpus)
    assert build(corpus, overwrite=True).manifest.num_questions == 4


def test_a_link_below_the_root_may_lead_to_another_disk(corpus: Any) -> None:
    corpus.tone("a.wav")
    shutil.move(corpus.root / "a.wav", corpus.folder / "a.wav")
    (corpus.root / "a.wav").symlink_to(corpus.folder / "a.wav")
    corpus.ask("a.wav")
    assert build(corpus).manifest.num_clips == 1


@pytest.mark.slow
def test_the_number_of_processes_does_not_show(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(12)
    faults = make_every_fault(corpus)
    build(corpus, max_rejected=0.9, out="one")
    build(corpus, max_rejected=0.9, out="three", workers=3)
    assert len(faults) == len(rejected(corpus.folder / "three"))
    assert len(list((corpus.folder / "one").glob("*.tar"))) >= 3
    assert folder_bytes(corpus.folder / "three") == folder_bytes(corpus.folder / "one")


def wait_for(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


# the command, which makes all shards and never publishes them: however late the kill comes, the build has not ended
WITHOUT_AN_END = """
import sys, time
from mellow_ds.packing.folder import OutputFolder
from shards.cli import main
OutputFolder.publish = lambda *_: time.sleep(600)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(corpus: Any, folder_bytes: Any, workers: int) -> None:
    corpus.ask_tones(60)
    for number in range(60):  # long enough to be killed between two shards
        corpus.tone(f"tone-{number:03d}.wav", seconds=4, rate=44_100, hertz=200 + number)
    out = corpus.folder / "out"
    settings = {"shard_megabytes": 1.0, "workers": workers}
    command = [sys.executable, "-c", WITHOUT_AN_END, "build", "--json", str(corpus.write())]
    command += ["--audio-root", str(corpus.root), "--out", str(out)]
    command += ["--shard-megabytes", "1.0", "--workers", str(workers)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        try:
            notes_came = wait_for(lambda: len(list(out.glob(".build/*.done.json"))) >= 2, seconds=120)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert notes_came
    assert not (out / MANIFEST_NAME).exists()
    assert wait_for(lambda: not any(child.is_running() for child in family), 60), "a worker outlived its build"
    with pytest.raises(PackingError, match="cannot be packed"):  # a changed input is not taken for done
        build(
            corpus.__class__(corpus.folder, [*corpus.records, "text"]), **{**settings, "max_rejected": 0, "workers": 1}
        )
    report = build(corpus, **settings)
    assert report.num_reused >= 2
    build(corpus, out="clean", **{**settings, "workers": 1})
    assert folder_bytes(out) == folder_bytes(corpus.folder / "clean")
    assert not (out / ".build").exists()


def test_a_shard_in_progress_is_reused_only_for_the_same_input(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(8, pairs=False)
    corpus.ask("gone.wav")
    with pytest.raises(PackingError):
        build(corpus)  # rejected before anything is packed
    # AU: libsndfile puts the time of writing into a WAV of floats, and with it the key and the place would change
    not_finite = np.full(50, np.nan, dtype=np.float32)
    soundfile.write(corpus.root / "gone.wav", not_finite, 8_000, format="AU", subtype="FLOAT")
    with pytest.raises(PackingError):
        build(corpus)  # rejected when all is packed
    work = corpus.folder / "out" / ".build"
    tars = sorted(work.glob("*.tar"))
    assert len(tars) >= 2
    payload = tars[0].read_bytes()
    tars[0].write_bytes(payload[:-1] + b"x")  # something else has been put in its place
    corpus.tone("tone-003.wav", hertz=987)
    corpus.tone("gone.wav", hertz=1_234)
    report = build(corpus)
    assert report.num_reused < len(tars)
    build(corpus, out="clean")
    assert folder_bytes(corpus.folder / "out") == folder_bytes(corpus.folder / "clean")


def test_stored_audio_is_the_source(corpus: Any) -> None:
    samples = np.random.default_rng(0).integers(-3_000, 3_000, 1_000).astype(np.int16)
    soundfile.write(corpus.root / "a.wav", samples, 32_000, subtype="PCM_16")
    corpus.ask("a.wav")
    build(corpus)
    with tarfile.open(corpus.folder / "out" / "shard-000000.tar") as tar:
        audio = tar.extractfile(tar.next()).read()  # type: ignore[arg-type,union-attr]
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(audio), dtype="int16")[0], samples)


def test_a_mistake_leaves_no_folder(corpus: Any) -> None:
    corpus.ask_tones(1)
    (corpus.folder / "text.json").write_text("no list")
    out = corpus.folder / "above" / "out"
    with pytest.raises(PackingError, match="is not JSON"):
        run_build([corpus.folder / "text.json"], corpus.root, out, BuildSettings(workers=1))
    assert not out.parent.exists()
    out.mkdir(parents=True)
    with pytest.raises(PackingError, match="is not JSON"):
        run_build([corpus.folder / "text.json"], corpus.root, out, BuildSettings(workers=1))
    assert list(out.iterdir()) == [], "what was there before stays, with nothing in it"


@pytest.mark.parametrize("num_parts", [0, 2])
def test_json_that_changes_while_it_is_read_gives_one_state_or_an_error(
    corpus: Any, folder_bytes: Any, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.ask_tones(4)
    settings = {"max_rejected": 0.5, "num_parts": num_parts}
    wanted = folder_bytes(build(corpus, out="wanted", **settings).folder)
    survey_sources = build_module.survey_sources

    def change_meanwhile(*arguments: Any) -> Any:
        found = survey_sources(*arguments)
        corpus.tone("late.wav")
        corpus.records = [{**corpus.records[0], "filepath1": "late.wav"}, *corpus.records]
        corpus.write()
        return found

    monkeypatch.setattr(build_module, "survey_sources", change_meanwhile)
    if num_parts:  # reads the files a second time
        with pytest.raises(PackingError, match="changed while it was read: start the build again"):
            build(corpus, **settings)
        assert not list((corpus.folder / "out").rglob("*.part"))
    else:
        assert folder_bytes(build(corpus, **settings).folder) == wanted


@pytest.mark.parametrize("stage", ["survey_sources", "plan_shards", "write_shards"])
def test_what_a_build_killed_before_its_shards_left_is_not_taken_for_its_work(
    corpus: Any, folder_bytes: Any, stage: str
) -> None:
    corpus.ask_tones(9)
    wanted = folder_bytes(build(corpus, out="wanted").folder)
    code = (
        "import os, signal, sys, mellow_ds.packing.build as build\n"
        f"build.{stage} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from shards.cli import main; main(sys.argv[1:])"
    )
    given = ["build", "--json", str(corpus.write()), "--audio-root", str(corpus.root), "--out"]
    given += [str(corpus.folder / "out"), "--shard-megabytes", str(SMALL), "--workers", "1"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=root, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    scratch = {path.name for path in (corpus.folder / "out" / ".build").iterdir()}
    assert scratch >= {"files.part"}
    for name in scratch:
        (corpus.folder / "out" / ".build" / name).write_bytes(b"half written")
    build(corpus)
    assert folder_bytes(corpus.folder / "out") == wanted


def test_a_finished_build_is_recognized_without_writing(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.ask_tones(3)
    build(corpus)
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        assert "w" not in mode
        assert "a" not in mode
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", lambda *_, **options: None if options["exist_ok"] else 1 / 0)
    monkeypatch.setattr(Path, "open", read_only)
    assert run_build(
        [corpus.folder / "records.json"],
        corpus.root,
        corpus.folder / "out",
        BuildSettings(workers=1, shard_megabytes=SMALL),
    ).was_finished
