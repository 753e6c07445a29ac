"""Samples come back as they were written; what is damaged, cut, replaced or misdescribed is named."""

import contextlib
import dataclasses
import hashlib
import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.data import reader as reader_module
from mellow_ds.data.reader import BadSampleError, Place, ShardReader
from mellow_ds.errors import ConfigError, MellowError, ShardError
from mellow_ds.shard_format import MANIFEST_NAME, index_name, read_manifest
from tests.data.made_shards import RATE, Clip, clip_key, simple_clips, write_shards
from tests.guide import quoted


def flip(path: Path, offset: int) -> None:
    """Turn all bits of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("codec", ["flac", "pcm"])
def test_samples_and_questions_are_those_written(tmp_path: Path, codec: str) -> None:
    made = [simple_clips(n, clips, questions_each=3) for n, clips in enumerate((5, 1, 8))]
    reader = ShardReader([write_shards(tmp_path / "s", made, codec)], RATE)
    assert reader.num_questions == (15, 3, 24)
    assert reader.num_examples == 42
    for shard, clips in enumerate(made):
        assert reader.num_samples(shard) == len(clips)
        for number in range(3 * len(clips)):
            row, in_sample = reader.locate(shard, number)
            assert (row, in_sample) == divmod(number, 3)
            sample = reader.sample(shard, row)
            question = sample.info.questions[in_sample]
            others, prompt, answer = clips[row].questions[in_sample]
            assert sample.place.key == clips[row].key
            assert (question.clips, question.input, question.answer) == ((clips[row].key, *others), prompt, answer)
            found = [reader.sample(shard, each).place.key for each in reader.rows_of(shard, question, sample, row)]
            assert tuple(found) == question.clips


def test_samples_without_questions_are_stepped_over(tmp_path: Path) -> None:
    clips = [Clip(clip_key(n), questions=[((), "q", "a")] * count) for n, count in enumerate((0, 2, 0, 0, 1, 0))]
    reader = ShardReader([write_shards(tmp_path / "s", [clips])], RATE)
    assert [reader.locate(0, number) for number in range(3)] == [(1, 0), (1, 1), (4, 0)]


def test_several_folders_are_one_list_of_shards(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / str(n), [simple_clips(n, 3), simple_clips(9 + n, 2)]) for n in range(2)]
    reader = ShardReader(folders, RATE)
    assert reader.num_questions == (6, 4, 6, 4)
    assert reader.subtypes == {"kind-1": 16, "kind-2": 4}
    assert reader.sample(2, 0).info == ShardReader(folders[1:], RATE).sample(0, 0).info
    prints = [ShardReader(order, RATE).fingerprint for order in (folders, folders[::-1], folders[:1], folders[1:])]
    assert len(set(prints)) == 4
    assert prints[2] == read_manifest(folders[0]).fingerprint


def test_members_far_apart_or_swapped_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 3)])
    expected = [ShardReader([folder], RATE).sample(0, row) for row in range(3)]
    monkeypatch.setattr(reader_module, "_MAX_GAP_BYTES", 0)
    found = [ShardReader([folder], RATE).sample(0, row) for row in range(3)]
    assert [bytes(s.audio) for s in found] == [bytes(s.audio) for s in expected]
    assert [s.info for s in found] == [s.info for s in expected]


@pytest.mark.parametrize("part", ["audio", "json"])
def test_a_flipped_byte_is_named_with_shard_key_and_offset(shards: Path, part: str) -> None:
    entry = np.load(shards / "shard-000001.index.npy")[2]
    flip(shards / "shard-000001.tar", int(entry[f"{part}_offset"]) + 20)
    reader = ShardReader([shards], RATE)
    with pytest.raises(BadSampleError) as caught:
        reader.sample(1, 2)
    key = entry["key"].decode()
    assert caught.value.kind == "checksum"
    assert caught.value.place == Place(str(shards / "shard-000001.tar"), key, int(entry["audio_offset"]))
    assert f"shard-000001.tar, sample {key} at offset {entry['audio_offset']}" in str(caught.value)
    reader.sample(1, 1)
    reader.sample(1, 3)


def test_a_bad_sample_survives_the_way_out_of_a_process() -> None:
    error = BadSampleError(Place("s.tar", "k", 3), "audio", "it is broken")
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own object, as loaders send it)
    assert (str(copied), copied.kind, copied.place) == (str(error), "audio", error.place)


def test_a_cut_shard_is_named_at_the_start(shards: Path) -> None:
    path = shards / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ShardError, match=r"shard-000002\.tar has \d+ " + quoted("bytes; the manifest says")):
        ShardReader([shards], RATE)


def test_a_shard_cut_while_it_is_open_is_named_with_offset(shards: Path) -> None:
    reader = ShardReader([shards], RATE)
    reader.sample(2, 0)
    path = shards / "shard-000002.tar"
    with path.open("r+b") as file:
        file.truncate(int(np.load(shards / "shard-000002.index.npy")[1]["audio_offset"]) + 10)
    with pytest.raises(
        BadSampleError, match=r"shard-000002\.tar, sample \w+ at offset \d+: the file ends \d+ bytes early"
    ):
        reader.sample(2, 1)


def test_a_shard_replaced_after_the_start_is_noticed(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [simple_clips(5, 10)])
    reader = ShardReader([shards], RATE)
    shutil.copy(other / "shard-000000.tar", shards)
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        reader.sample(0, 0)
    shutil.copy(other / "shard-000000.index.npy", shards)
    with pytest.raises(ShardError, match=r"shard-000000\.index\.npy is not the index"):
        ShardReader([shards], RATE).sample(0, 0)


def test_a_question_about_a_clip_that_is_not_there_is_named(tmp_path: Path) -> None:
    clips = [Clip(clip_key("a"), questions=[((clip_key("gone"),), "compare", "no")])]
    reader = ShardReader([write_shards(tmp_path / "s", [clips])], RATE)
    sample = reader.sample(0, 0)
    with pytest.raises(BadSampleError, match=f"names the clip {clip_key('gone')}, which is not in this shard"):
        reader.rows_of(0, sample.info.questions[0], sample, 0)


def test_wrong_folders_and_rates_are_refused_by_name(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"packed at 8000 Hz, but data\.sampling_rate is 32000"):
        ShardReader([shards], 32_000)
    with pytest.raises(ShardError, match="nowhere is not there"):
        ShardReader([tmp_path / "nowhere"], RATE)
    with pytest.raises(ShardError, match="none given"):
        ShardReader([], RATE)
    rewrite_manifest(shards, format_version=99)
    with pytest.raises(ShardError, match="format version 99"):
        ShardReader([shards], RATE)


def test_an_index_that_counts_other_questions_than_the_manifest_is_refused(shards: Path) -> None:
    infos = [dataclasses.asdict(shard) for shard in read_manifest(shards).shards]
    infos[1]["num_questions"] += 1
    rewrite_manifest(shards, shards=infos)
    with pytest.raises(ShardError, match=r"shard-000001\.tar counts 14 questions; the manifest says 15"):
        ShardReader([shards], RATE).locate(1, 0)


def test_a_manifest_cannot_lead_out_of_its_folder(shards: Path) -> None:
    infos = [dataclasses.asdict(shard) for shard in read_manifest(shards).shards]
    infos[0]["name"] = "../shard-000000.tar"
    rewrite_manifest(shards, shards=infos)
    with pytest.raises(ShardError, match="is not a file name of this folder"):
        ShardReader([shards], RATE)


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_FILES", 3)
    monkeypatch.setattr(reader_module, "_MAX_INDEXES", 2)
    reader = ShardReader([write_shards(tmp_path / "s", [simple_clips(n, 2) for n in range(9)])], RATE)
    for _ in range(2):
        for shard in range(9):
            reader.sample(shard, 1)
    assert len([link for link in Path("/proc/self/fd").iterdir() if str(link.resolve()).startswith(str(tmp_path))]) == 3
    reader.close()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(link.resolve()).startswith(str(tmp_path))]


def copies_of(folder: Path, out: Path, count: int) -> Path:
    """A folder of `count` shards, all links to the first of `folder`."""
    out.mkdir()
    info = read_manifest(folder).shards[0]
    infos = []
    for number in range(count):
        name = f"shard-{number:06d}.tar"
        for old, new in ((info.name, name), (index_name(info.name), index_name(name))):
            (out / new).hardlink_to(folder / old)
        infos.append({**dataclasses.asdict(info), "name": name})
    content = json.loads((folder / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps({**content, "shards": infos}))
    return out


def seconds_to_open_and_find(folder: Path) -> float:
    """From nothing to the last question's sample; CPU time, the best of three, as other processes disturb."""
    found = []
    for _ in range(3):
        started = time.process_time()
        reader = ShardReader([folder], RATE)
        row, _ = reader.locate(len(reader.shards) - 1, 3)
        reader.sample(len(reader.shards) - 1, row)
        found.append(time.process_time() - started)
    return min(found)


@pytest.mark.slow
def test_ten_thousand_shards_open_as_ten_do(tmp_path: Path) -> None:
    base = write_shards(tmp_path / "base", [simple_clips(0, 2)])
    few, many = (copies_of(base, tmp_path / str(count), count) for count in (10, 10_000))
    assert seconds_to_open_and_find(many) - seconds_to_open_and_find(few) < 1.0


def test_only_the_shards_that_are_read_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_shards(tmp_path / "base", [simple_clips(0, 2)])
    folder = copies_of(base, tmp_path / "many", 1000)
    opened: list[str] = []
    kept = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.append(path.name), kept(path))[1])
    reader = ShardReader([folder], RATE)
    reader.sample(700, reader.locate(700, 0)[0])
    assert opened == ["shard-000700.index.npy"]


def test_shards_of_different_kinds_are_not_mixed(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [simple_clips(0, 2)])
    features = {
        "encoder": "abc",
        "encoder_name": "HTSAT",
        "clip_samples": 9,
        "embeddings": [1, 2],
        "posteriors": [0, 0],
    }
    rewrite_manifest(other, codec="features", features={**features, "max_crops": 1})
    with pytest.raises(ConfigError, match="other holds features of HTSAT, but the shards before it hold audio"):
        ShardReader([shards, other], RATE)


def test_a_reader_travels_to_another_process_without_its_files(shards: Path) -> None:
    reader = ShardReader([shards], RATE)
    reader.sample(0, 0)
    copied = pickle.loads(pickle.dumps(reader))  # noqa: S301 (our own object, as loaders get it)
    assert copied.sample(1, 1).info == reader.sample(1, 1).info
    assert copied.fingerprint == reader.fingerprint


@pytest.mark.parametrize("field", ["num_frames", "num_questions"])
def test_an_index_that_describes_another_sample_is_noticed(shards: Path, field: str) -> None:
    path = shards / "shard-000000.index.npy"
    rows = np.load(path)
    rows[field][3] += 1
    if field == "num_questions":
        rows[field][4] -= 1  # the sum stays that of the manifest
    np.save(path, rows)
    infos = [dataclasses.asdict(shard) for shard in read_manifest(shards).shards]
    infos[0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite_manifest(shards, shards=infos)
    with pytest.raises(BadSampleError, match="questions are not those in the index") as caught:
        _ = ShardReader([shards], RATE).sample(0, 3).info
    assert caught.value.kind == "json"


def test_mutated_shard_folders_give_our_errors_or_nothing(tmp_path: Path) -> None:
    """Bytes changed, cut off or doubled anywhere in manifest, index or tar; the long form is a soak."""
    random = np.random.default_rng(4)
    good = write_shards(tmp_path / "good", [simple_clips(0, 3), simple_clips(1, 2)], "flac")
    for number in range(80):
        folder = tmp_path / f"bad-{number}"
        shutil.copytree(good, folder)
        path = sorted(folder.iterdir())[number % 5]
        content = bytearray(path.read_bytes())
        at = int(random.integers(len(content)))
        change = [bytes([content[at] ^ int(random.integers(1, 256))]), b"", bytes(content[at : at + 2]) * 2][number % 3]
        content[at : at + 1] = change
        path.write_bytes(content)
        with contextlib.suppress(MellowError):
            reader = ShardReader([folder], RATE)
            for shard in range(len(reader.shards)):
                for row in range(reader.num_samples(shard)):
                    with contextlib.suppress(BadSampleError):
                        assert reader.sample(shard, row).info.questions
        shutil.rmtree(folder)
