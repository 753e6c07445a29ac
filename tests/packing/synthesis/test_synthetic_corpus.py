"""The folder on disk: what is in it, that it is the same each time, and that it is not mixed with another."""

import hashlib
import json
import logging

import numpy as np
import pytest
import soundfile

from mellow_ds.errors import FaultError, PackingError
from mellow_ds.packing.synthesis.corpus import SAMPLE_RATE, synthesize
from mellow_ds.packing.synthesis.scenes import draw_scenes, scene_waveform

COUNTS = {"train": 9, "val": 4, "test": 3}


def digests(folder) -> dict[str, str]:
    """SHA-256 by path of every file below `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def corpus(tmp_path):
    synthesize(tmp_path / "corpus", COUNTS, 11, "wav", 0)
    return tmp_path / "corpus"


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_files_hold_the_scenes_as_16_bit_audio(tmp_path, audio_format):
    synthesize(tmp_path, {"train": 5, "val": 2}, 3, audio_format, 1, sample_rate=22_050)
    for split, count in (("train", 5), ("val", 2)):
        for scene in draw_scenes(3, split, count):
            path = tmp_path / "audio" / split / f"{scene.number:05d}.{audio_format}"
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.subtype) == (22_050, 1, "PCM_16")
            assert info.format == audio_format.upper()
            wave, _ = soundfile.read(path)
            assert np.abs(wave - scene_waveform(scene, 22_050)).max() <= 1.01 / 32768
            assert np.abs(wave).max() < 0.95
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "corpus.json", "train.json", "val.json"]


def test_json_names_files_that_are_there_and_splits_share_none(corpus):
    clips = {}
    for split in COUNTS:
        records = json.loads((corpus / f"{split}.json").read_text(encoding="utf-8"))
        clips[split] = {path for r in records for path in (r["filepath1"], r["filepath2"]) if path}
        assert len({r["filepath1"] for r in records}) == COUNTS[split]
        assert all((corpus / path).is_file() for path in clips[split])
    assert not clips["train"] & clips["val"]
    hashes = [digest for path, digest in digests(corpus).items() if path.endswith(".wav")]
    assert len(set(hashes)) == len(hashes) == sum(COUNTS.values())


def test_the_same_bytes_whatever_the_workers_and_other_bytes_for_another_seed(corpus, tmp_path):
    synthesize(tmp_path / "two", COUNTS, 11, "wav", 2)
    assert digests(tmp_path / "two") == digests(corpus)
    synthesize(tmp_path / "other", COUNTS, 12, "wav", 0)
    same = {p for p, d in digests(tmp_path / "other").items() if digests(corpus)[p] == d}
    assert not same


def test_a_second_call_reuses_and_says_so(corpus, caplog):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    with caplog.at_level(logging.INFO, logger="mellow_ds.packing"):
        synthesize(corpus, COUNTS, 11, "wav", 2)
    assert "already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_what_is_missing_is_made_again(corpus):
    wanted = digests(corpus)
    (corpus / "audio" / "train" / "00003.wav").unlink()
    (corpus / "val.json").unlink()
    synthesize(corpus, COUNTS, 11, "wav", 0)
    assert digests(corpus) == wanted


def test_a_killed_run_goes_on_where_it_stopped(corpus):
    wanted = digests(corpus)
    (corpus / "corpus.json").rename(corpus / "corpus.partial.json")
    for number in (6, 7, 8):
        (corpus / "audio" / "train" / f"{number:05d}.wav").unlink()
    (corpus / "audio" / "train" / "00006.wav.partial").write_bytes(b"half a file")
    (corpus / "test.json").unlink()
    kept = (corpus / "audio" / "train" / "00000.wav").stat().st_mtime_ns
    synthesize(corpus, COUNTS, 11, "wav", 0)
    assert digests(corpus) == wanted
    assert (corpus / "audio" / "train" / "00000.wav").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_clips": {**COUNTS, "train": 10}}, "num_clips"),
        ({"seed": 12}, "seed"),
        ({"audio_format": "flac"}, "audio_format"),
        ({"sample_rate": 8_000}, "sample_rate"),
    ],
)
@pytest.mark.parametrize("name", ["corpus.json", "corpus.partial.json"])
def test_another_corpus_is_refused_and_left_alone(corpus, changed, named, name):
    (corpus / "corpus.json").rename(corpus / name)
    before = digests(corpus)
    arguments = {"num_clips": COUNTS, "seed": 11, "audio_format": "wav", "workers": 0, **changed}
    with pytest.raises(PackingError, match=named):
        synthesize(corpus, **arguments)
    assert digests(corpus) == before


@pytest.mark.parametrize("name", ["audio", "train.json"])
def test_a_folder_with_someone_elses_files_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(PackingError, match=name):
        synthesize(tmp_path, COUNTS, 11, "wav", 0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_are_not_in_the_way_do_not_hinder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    synthesize(tmp_path, {"train": 1}, 11, "wav", 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_clips": {"train": -1, "val": 2}}, "-1 clips"),
        ({"num_clips": {"train": 0}}, "no clips"),
        ({"num_clips": {}}, "no clips"),
        ({"num_clips": {"../up": 3}}, "split"),
        ({"num_clips": {"corpus": 3}}, "split"),
        ({"audio_format": "mp3"}, "mp3"),
        ({"workers": -1}, "workers"),
        ({"sample_rate": 4_000}, "sample rate"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(tmp_path, changed, named):
    arguments = {"num_clips": COUNTS, "seed": 1, "audio_format": "wav", "workers": 0, **changed}
    with pytest.raises(PackingError, match=named) as caught:
        synthesize(tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_marker_and_a_file_for_a_folder_are_named(tmp_path):
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(PackingError, match=r"corpus\.json"):
        synthesize(tmp_path, COUNTS, 1, "wav", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PackingError, match="file"):
        synthesize(tmp_path / "file", COUNTS, 1, "wav", 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_written_is_named(corpus, workers):
    blocked = corpus / "audio" / "val" / "00001.wav"
    blocked.unlink()
    blocked.mkdir()  # stands for any failure to write, as root too
    (corpus / "audio" / "train" / "00000.wav").unlink()
    with pytest.raises(FaultError, match=r"val/00001\.wav"):
        synthesize(corpus, COUNTS, 11, "wav", workers)


def test_a_split_of_no_clips_is_left_out(tmp_path):
    synthesize(tmp_path, {"train": 2, "val": 0}, 1, "wav", 0)
    assert not (tmp_path / "val.json").exists()
    assert soundfile.info(tmp_path / "audio" / "train" / "00000.wav").samplerate == SAMPLE_RATE
