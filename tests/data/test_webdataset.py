"""Shards through plain webdataset and through our pipeline; hostile tars are refused and nothing in them runs."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_ds.data.webdataset import as_webdataset
from mellow_ds.errors import ShardError
from mellow_ds.shard_format import MANIFEST_NAME, SampleInfo
from tests.data.made_shards import RATE, Clip, clip_key, simple_clips, write_shards


@pytest.mark.parametrize("codec", ["flac", "pcm"])
def test_plain_webdataset_reads_the_tars(tmp_path: Path, codec: str) -> None:
    import webdataset

    clips = simple_clips(0, 4)
    folder = write_shards(tmp_path / "s", [clips], codec)
    found = list(webdataset.WebDataset([str(folder / "shard-000000.tar")], shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [clip.key for clip in clips]
    for sample, clip in zip(found, clips, strict=True):
        audio, _ = soundfile.read(io.BytesIO(sample["flac" if codec == "flac" else "wav"]), dtype="int16")
        np.testing.assert_array_equal(audio, clip.samples())
        assert len(SampleInfo.from_json(sample["json"], "here").questions) == 2


@pytest.mark.parametrize("codec", ["flac", "pcm"])
def test_the_pipeline_gives_decoded_samples_of_all_shards(tmp_path: Path, codec: str) -> None:
    made = [simple_clips(n, clips) for n, clips in enumerate((4, 2))]
    found = list(as_webdataset(write_shards(tmp_path / "s", made, codec)))
    clips = [clip for shard in made for clip in shard]
    assert [sample["key"] for sample in found] == [clip.key for clip in clips]
    for sample, clip in zip(found, clips, strict=True):
        np.testing.assert_array_equal(sample["audio"], clip.samples() / np.float32(32768))
        assert (sample["sample_rate"], sample["info"].num_frames) == (RATE, clip.num_frames)


def test_the_pipeline_shuffles_and_chains(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 20)])
    plain = [sample["key"] for sample in as_webdataset(folder)]
    shuffled = [sample["key"] for sample in as_webdataset(folder, shuffle_samples=10, seed=1)]
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert list(as_webdataset(folder).map(lambda sample: sample["info"].num_frames)) == [
        400 + 10 * n for n in range(20)
    ]


@pytest.mark.parametrize("address", ["pipe:touch {marker}", "http://127.0.0.1:9/shards", "s3://bucket/shards"])
def test_addresses_and_commands_are_refused(tmp_path: Path, address: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ShardError, match="is not a local folder"):
        as_webdataset(address.format(marker=marker))
    assert not marker.exists()


def test_a_folder_whose_name_looks_like_a_command_is_only_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    folder = write_shards(tmp_path / "$(touch marker) {a,b} pipe:x", [simple_clips(0, 2)])
    assert len(list(as_webdataset(folder))) == 2
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match="is not there"):
        as_webdataset(f"x; touch {marker}")
    assert not marker.exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def add_member(folder: Path, name: str, payload: bytes) -> None:
    """Put another member behind the last, keeping manifest and index in step with the size."""
    path = folder / "shard-000000.tar"
    size = path.stat().st_size
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    manifest = folder / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace(f'"num_bytes": {size}', f'"num_bytes": {path.stat().st_size}'))


@pytest.mark.parametrize("extension", ["pickle", "pkl", "pth", "PYD", "pyd.gz", "pkl.gz", "ten", "pt", "npz"])
def test_no_member_is_ever_unpickled(tmp_path: Path, extension: str) -> None:
    marker = tmp_path / "marker"
    clips = [Clip(clip_key(0), questions=[((), "q", "a")])]
    folder = write_shards(tmp_path / "s", [clips])
    add_member(folder, f"{clip_key(0)}.{extension}", pickle.dumps(Bomb(marker)))
    with pytest.raises(ShardError, match=rf"{clip_key(0)} has the members .*{extension.lower()}"):
        list(as_webdataset(folder))
    assert not marker.exists()


def test_damaged_cut_and_doubtful_shards_are_named(tmp_path: Path) -> None:
    for name, change in {
        "flip": lambda path, at: path.write_bytes(path.read_bytes()[:at] + b"\xff\xee" + path.read_bytes()[at + 2 :]),
        "header": lambda path, at: path.write_bytes(
            path.read_bytes()[: at - 512] + b"\xff" * 512 + path.read_bytes()[at:]
        ),
        "cut": lambda path, at: path.write_bytes(path.read_bytes()[:at]),
    }.items():
        folder = write_shards(tmp_path / name, [simple_clips(0, 5)])
        at = int(np.load(folder / "shard-000000.index.npy")[3]["audio_offset"])
        change(folder / "shard-000000.tar", at)
        with pytest.raises(ShardError, match=r"shard-000000\.tar"):
            list(as_webdataset(folder))


def test_samples_whose_parts_are_not_adjacent_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 2)])
    add_member(folder, f"{simple_clips(0, 2)[0].key}.wav", b"again")
    with pytest.raises(ShardError, match="wanted are one of audio and json"):
        list(as_webdataset(folder))


def test_a_directory_or_link_in_the_tar_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 2)])
    path = folder / "shard-000000.tar"
    size = path.stat().st_size
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("x.wav")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    manifest = folder / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace(f'"num_bytes": {size}', f'"num_bytes": {path.stat().st_size}'))
    with pytest.raises(ShardError, match=r"has the member 'x\.wav'"):
        list(as_webdataset(folder))
