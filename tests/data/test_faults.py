"""Bad input, cases 1 to 13: what the suite shows of each, with real files and processes.

| case | shown by |
| --- | --- |
| 1 shard cut inside data | here; test_reader (at the start, while open); test_remote_reader (in the cache) |
| 2 shard cut at a member boundary | here; packing/test_verify |
| 3 corrupt header | here; test_webdataset; packing/test_verify |
| 4 corrupt payload | here; test_stream (left out, counted, past the fraction); test_reader; test_webdataset |
| 5 sample without audio or text | here; packing/test_records, packing/test_build (rejected when packed) |
| 6 parts apart, keys twice | here; test_reader (parts apart are read by offset); test_webdataset; packing/test_verify |
| 7 pickles | here; test_webdataset (nine endings) |
| 8 `pipe:` and shell characters | test_remote, test_remote_reader, test_webdataset |
| 9 bombs, crafted headers | here, with little memory to be had; test_audio; packing/test_decode |
| 10 no frames, half a file, NaN | here, through the stream; test_audio; packing/test_decode |
| 11 fewer shards than ranks x loader processes | here |
| 12 uneven shards | here, with a collective in each step |
| 13 shard replaced after the start, or on resume | here; test_reader; test_stream; test_remote_reader |
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mellow_ds.config.schema import DataConfig
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.reader import BadSampleError, ShardReader
from mellow_ds.data.stream import StepBatches, TrainStream
from mellow_ds.errors import MellowError, ShardError
from mellow_ds.packing.verify import verify_shards
from mellow_ds.shard_format import MANIFEST_NAME, read_manifest, sample_checksum
from mellow_ds.world import World
from tests.data.made_shards import (
    RATE,
    CharTokenizer,
    Clip,
    clip_key,
    encode_audio,
    make_layout,
    simple_clips,
    write_shards,
)
from tests.guide import quoted
from tests.ranks import run_ranks

TAR, INDEX = "shard-000000.tar", "shard-000000.index.npy"


def stream_of(
    reader: ShardReader, world: World | None = None, max_bad_fraction: float = 0.0, workers: int = 0, **places: Any
) -> TrainStream:
    data = DataConfig(sampling_rate=RATE, segment_seconds=0.05, max_bad_fraction=max_bad_fraction)
    train = TrainConfig(batch_size=3, global_batch_size=12, num_workers=workers)
    return TrainStream(reader, CharTokenizer(), make_layout(), data, train, world or World(), **places)


def one_epoch(folder: Path, max_bad_fraction: float = 0.0) -> list[StepBatches]:
    stream = stream_of(ShardReader([folder], RATE), max_bad_fraction=max_bad_fraction)
    return [next(stream) for _ in range(stream.steps_per_epoch)]


def ids_of(steps: list[StepBatches]) -> list[str]:
    return [example for step in steps for batch in step.micro_batches for example in batch.example_ids]


def all_ids(folder: Path) -> list[str]:
    reader = ShardReader([folder], RATE)
    return sorted(q.id for shard in range(len(reader.shards)) for info in reader.infos(shard) for q in info.questions)


def sign(folder: Path, **shard_fields: Any) -> None:
    """Make the manifest fit the first shard's files as they are now: only a look inside can tell."""
    hashes = {"sha256": folder / TAR, "index_sha256": folder / INDEX}
    fields = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in hashes.items()}
    infos = [dataclasses.asdict(shard) for shard in read_manifest(folder).shards]
    infos[0].update(num_bytes=(folder / TAR).stat().st_size, **fields, **shard_fields)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**content, "shards": infos}))


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert isinstance(error.value, MellowError)
    assert "\n" not in str(error.value)
    return str(error.value)


# 1, 2, 3: tars that are cut or overwritten


def test_1_a_shard_cut_while_a_run_reads_it_is_named_and_left_out_only_if_asked(shards: Path) -> None:
    key = np.load(shards / INDEX)[4]["key"].decode()
    for fraction in (0.0, 0.9):
        whole = (shards / TAR).read_bytes()
        reader = ShardReader([shards], RATE)
        stream = stream_of(reader, max_bad_fraction=fraction)
        reader.sample(0, 0)
        os.truncate(shards / TAR, int(np.load(shards / INDEX)[4]["audio_offset"]) + 7)
        if fraction == 0:
            with pytest.raises(BadSampleError, match=rf"{TAR}, sample \w+ at offset \d+: the file ends") as error:
                list(zip(stream, range(stream.steps_per_epoch), strict=False))
            one_line(error)
        else:
            steps = [next(stream) for _ in range(stream.steps_per_epoch)]
            skipped = sum(step.stats.skipped_examples for step in steps)
            bad = {error.place.key: error.kind for step in steps for error in step.stats.bad_samples}
            assert len(ids_of(steps)) + skipped == 42
            assert skipped >= 12
            assert bad[key] == "cut"
            assert len(bad) == 6
        (shards / TAR).write_bytes(whole)


def test_2_a_shard_cut_between_members_is_named(shards: Path) -> None:
    with tarfile.open(shards / TAR) as tar:
        boundary = tar.getmembers()[6].offset
    os.truncate(shards / TAR, boundary)
    with pytest.raises(ShardError, match=rf"{TAR} has {boundary} bytes; the manifest says \d+") as error:
        one_epoch(shards)
    one_line(error)
    sign(shards)  # even where somebody made the manifest fit
    with pytest.raises(BadSampleError, match=r"the file ends \d+ bytes early"):
        one_epoch(shards)


def test_3_an_overwritten_header_costs_no_sample_and_is_found_by_verify(shards: Path) -> None:
    expected = ids_of(one_epoch(shards))
    with tarfile.open(shards / TAR) as tar:
        header = tar.getmembers()[6].offset
    content = bytearray((shards / TAR).read_bytes())
    content[header : header + 512] = os.urandom(512)
    (shards / TAR).write_bytes(content)
    assert ids_of(one_epoch(shards)) == expected  # samples are read by offset, and each is held against its checksum
    assert any("SHA-256 differs" in problem for problem in verify_shards(shards))


# 4, 5, 6: samples that are damaged or not whole


def test_4_a_corrupt_payload_is_quarantined_counted_and_named(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = np.load(shards / INDEX)[2]
    content = bytearray((shards / TAR).read_bytes())
    for place in range(int(row["audio_offset"]) + 50, int(row["audio_offset"]) + 60):
        content[place] ^= 0x55
    (shards / TAR).write_bytes(content)
    caplog.set_level(logging.WARNING, "mellow_ds")
    steps = one_epoch(shards, 0.1)
    bad = [error for step in steps for error in step.stats.bad_samples]
    assert {error.place.key for error in bad} == {row["key"].decode()}
    assert sum(step.stats.skipped_examples for step in steps) == 42 - len(ids_of(steps)) > 0
    assert f"left out bad sample number 1 (checksum): {shards / TAR}, sample {row['key'].decode()}" in caplog.text
    with pytest.raises(ShardError, match=r"more than data\.max_bad_fraction \(0\.01\) allows"):
        one_epoch(shards, 0.01)


def without_a_part(folder: Path, part: str, row: int) -> str:
    """Make a sample's audio or JSON empty, with checksum and hashes that fit; returns its key."""
    rows = np.load(folder / INDEX)
    rows[f"{part}_bytes"][row] = 0
    entry, content = rows[row], (folder / TAR).read_bytes()
    payloads = [content[int(entry[f"{p}_offset"]) :][: int(entry[f"{p}_bytes"])] for p in ("audio", "json")]
    rows["checksum"][row] = sample_checksum(payloads[0], payloads[1])
    np.save(folder / INDEX, rows)
    sign(folder)
    return str(entry["key"].decode())


@pytest.mark.parametrize(("part", "kind"), [("audio", "audio"), ("json", "json")])
def test_5_a_sample_without_audio_or_text_is_counted(shards: Path, part: str, kind: str) -> None:
    key = without_a_part(shards, part, 3)
    with pytest.raises(BadSampleError, match=rf"{TAR}, sample {key}") as error:
        one_epoch(shards)
    one_line(error)
    steps = one_epoch(shards, 0.2)
    assert {(error.place.key, error.kind) for step in steps for error in step.stats.bad_samples} == {(key, kind)}
    assert 2 <= sum(step.stats.skipped_examples for step in steps) <= 3
    assert any(key in problem for problem in verify_shards(shards))


def test_6_a_clip_that_stands_twice_in_a_shard_is_named(tmp_path: Path) -> None:
    clips = simple_clips(0, 4)
    clips[3] = dataclasses.replace(clips[3], key=clips[1].key)
    folder = write_shards(tmp_path / "s", [clips])
    with pytest.raises(ShardError, match=rf"{TAR} holds the clip {clips[1].key} twice") as error:
        one_epoch(folder)
    one_line(error)
    assert any("names a clip twice" in problem for problem in verify_shards(folder))


# 7: members that would run code


class MakesMarker:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["x.pkl", "x.PYD", "x.pyd.gz", "x.pth", "{key}.pickle", "{key}.json.pkl"])
def test_7_a_pickle_among_the_members_is_never_executed(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    clips = simple_clips(0, 3)
    folder = write_shards(tmp_path / "s", [clips])
    payload = pickle.dumps(MakesMarker(marker))
    with tarfile.open(folder / TAR, "a") as tar:
        member = tarfile.TarInfo(name.format(key=clips[2].key))
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    sign(folder)
    assert sorted(ids_of(one_epoch(folder))) == all_ids(folder)
    assert any("as a tar it differs from the index" in problem for problem in verify_shards(folder))
    assert not marker.exists()


@pytest.mark.parametrize("part", ["audio", "json"])
def test_7_a_pickle_in_place_of_audio_or_text_is_never_executed(tmp_path: Path, part: str) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(MakesMarker(marker))
    clips = [Clip(clip_key(n), questions=[((), "q", "a")], audio=payload if part == "audio" else None) for n in "ab"]
    folder = write_shards(tmp_path / "s", [clips])
    if part == "json":
        rows, content = np.load(folder / INDEX), bytearray((folder / TAR).read_bytes())
        start = int(rows["json_offset"][1])
        content[start : start + len(payload)] = payload
        audio = content[int(rows["audio_offset"][1]) :][: int(rows["audio_bytes"][1])]
        rows["json_bytes"][1] = len(payload)
        rows["checksum"][1] = sample_checksum(bytes(audio), payload)
        (folder / TAR).write_bytes(content)
        np.save(folder / INDEX, rows)
        sign(folder)
    with pytest.raises(BadSampleError) as error:
        one_epoch(folder)
    one_line(error)
    assert error.value.kind == part
    assert not marker.exists()


def test_7_a_pickle_in_place_of_an_index_or_manifest_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    objects = io.BytesIO()
    np.save(objects, np.array([MakesMarker(marker)] * 4, dtype=object))
    archive = io.BytesIO()
    np.savez(archive, rows=np.zeros(4))
    for number, payload in enumerate((pickle.dumps(MakesMarker(marker)), objects.getvalue(), archive.getvalue(), b"")):
        folder = write_shards(tmp_path / str(number), [simple_clips(0, 4)])
        (folder / INDEX).write_bytes(payload)
        sign(folder)
        with pytest.raises(ShardError, match=INDEX) as error:
            one_epoch(folder)
        one_line(error)
        (folder / MANIFEST_NAME).write_bytes(payload)
        with pytest.raises(ShardError, match=MANIFEST_NAME) as error:
            one_epoch(folder)
        one_line(error)
    assert not marker.exists()


# 9, 10: audio that costs too much or is not there


def wav_header(channels: int = 1, rate: int = RATE, data_bytes: int = 800, bits: int = 16) -> bytes:
    block = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, (rate * block) % 2**32, block % 2**16, bits)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + data_bytes & 0xFFFFFFFF, b"WAVE")
        + form
        + struct.pack("<4sI", b"data", data_bytes)
    )


def flac_that_claims(frames: int, rate: int = RATE) -> bytes:
    """A FLAC file whose STREAMINFO (20 bits of rate, 3, 5, 36 bits of samples at byte 18) is overwritten."""
    audio = bytearray(encode_audio(np.zeros(400, np.int16), "flac"))
    audio[18:26] = (rate << 44 | 15 << 36 | frames).to_bytes(8, "big")
    return bytes(audio)


def long_silence() -> bytes:
    """Ten minutes of silence in some kilobytes."""
    return encode_audio(np.zeros(600 * RATE, np.int16), "flac")


BOMBS: dict[str, tuple[Callable[[], bytes], int]] = {  # audio, and the frames that the index says
    "1,024 channels": (lambda: wav_header(1024, data_bytes=2048 * 400) + bytes(2048 * 400), 400),
    "65,535 channels": (lambda: wav_header(65_535) + bytes(800), 400),
    "rate 0": (lambda: wav_header(rate=0) + bytes(800), 400),
    "rate 4 GHz": (lambda: wav_header(rate=2**32 - 1) + bytes(800), 400),
    "4 GB announced": (lambda: wav_header(data_bytes=2**32 - 37) + bytes(800), 400),
    "4 GB announced and indexed": (lambda: wav_header(data_bytes=2**32 - 38) + bytes(800), 2**31 - 20),
    "FLAC of 2**36 - 1 frames": (lambda: flac_that_claims(2**36 - 1), 400),
    "FLAC of 2**32 - 1 frames, indexed": (lambda: flac_that_claims(2**32 - 1), 2**32 - 1),
    "FLAC with rate 0": (lambda: flac_that_claims(400, rate=0), 400),
    "ten minutes of silence": (long_silence, 400),
    "ten minutes of silence, indexed": (long_silence, 600 * RATE),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(1000), 400),
}

READ_WITH_LITTLE_MEMORY = """
import json, resource, sys
import numpy as np, soundfile
from mellow_ds.data.audio import AudioError, decode_clip, decode_window
from mellow_ds.data.reader import ShardReader
from mellow_ds.packing.decode import BadClip, pack_clip
import torch, torchaudio
lines = [line.split() for line in open("/proc/self/status")]
used = 1024 * int(next(line[1] for line in lines if line[0] == "VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
reader, found = ShardReader([sys.argv[1]], 8000), []
for row in range(reader.num_samples(0)):
    sample, results = reader.sample(0, row), []
    out = np.empty(400, dtype=np.float32)
    for decode in (lambda: decode_window(sample.audio, 8000, sample.num_frames, 0, out),
                   lambda: decode_clip(sample.audio, 8000, sample.num_frames),
                   lambda: pack_clip(bytes(sample.audio), 8000, "flac")):
        try:
            decode()
            results.append("taken")
        except (AudioError, BadClip):
            results.append("refused")
    found.append(results)
print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_9_bombs_and_crafted_headers_cost_no_memory(tmp_path: Path) -> None:
    clips = [
        Clip(clip_key(name), num_frames=frames, questions=[((), "q", "a")], audio=make())
        for name, (make, frames) in BOMBS.items()
    ]
    folder = write_shards(tmp_path / "s", [clips])
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, _ = json.loads(done.stdout)
    results = dict(zip(BOMBS, found, strict=True))
    # a length that the index names is no lie: a window of it is decoded; the packer takes clips of up to an hour
    assert results.pop("ten minutes of silence, indexed") == ["taken", "taken", "taken"]
    assert results.pop("ten minutes of silence") == ["refused", "refused", "taken"]
    # 400 frames stand there: what ffmpeg writes into a pipe, which the packer takes for what it is
    assert results.pop("4 GB announced") == ["taken", "taken", "taken"]
    assert results.pop("4 GB announced and indexed") == ["refused", "refused", "taken"]
    assert {name: result for name, result in results.items() if result != ["refused"] * 3} == {}


def test_9_an_index_cannot_ask_for_more_than_a_member_may_have(shards: Path) -> None:
    rows = np.load(shards / INDEX)
    rows["audio_bytes"][1] = 2**32 - 1
    np.save(shards / INDEX, rows)
    sign(shards)
    with pytest.raises(ShardError, match="more than a sample may have"):
        ShardReader([shards], RATE).sample(0, 1)


@pytest.mark.parametrize("part", ["audio", "json"])
def test_9_an_offset_that_no_file_can_have_is_a_sample_that_is_cut(shards: Path, part: str) -> None:
    rows = np.load(shards / INDEX)
    rows[f"{part}_offset"][1] = 2**63 + 7
    np.save(shards / INDEX, rows)
    sign(shards)
    with pytest.raises(BadSampleError, match="the file ends") as error:
        ShardReader([shards], RATE).sample(0, 1)
    one_line(error)


def test_9_an_index_that_announces_more_rows_than_fit_into_memory_is_refused(shards: Path) -> None:
    header = (shards / INDEX).read_bytes()
    at = header.index(b"'shape': (10,)")
    for end in (27, 14):  # the blanks behind it make room for the digits; 14: the header is no longer one
        (shards / INDEX).write_bytes(header[:at] + b"'shape': (%d,)" % 10**14 + header[at + end :])
        sign(shards)
        with pytest.raises(ShardError, match=INDEX) as error:
            ShardReader([shards], RATE).sample(0, 1)
        one_line(error)


def as_file(samples: np.ndarray, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=form, subtype=subtype)
    return file.getvalue()


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 400)


@pytest.mark.parametrize(
    "audio",
    [
        as_file(NOISE[:0]),
        as_file(NOISE[:0], "FLAC"),
        as_file(NOISE)[:444],
        as_file(NOISE, "FLAC")[:400],
        as_file(NOISE[:200]),
        as_file(np.where(np.arange(400) == 9, np.nan, NOISE), subtype="FLOAT"),
        as_file(np.where(np.arange(400) == 9, np.inf, NOISE), subtype="FLOAT"),
        as_file(NOISE, "MP3", "MPEG_LAYER_III"),
        b"",
    ],
    ids=["0 frames", "0 frames of FLAC", "half WAV", "half FLAC", "half the frames", "NaN", "Inf", "MP3", "nothing"],
)
def test_10_audio_that_is_not_what_the_index_says_is_left_out_and_counted(tmp_path: Path, audio: bytes) -> None:
    clips = [Clip(clip_key(n), questions=[((), f"q {n}", "a")]) for n in range(6)]
    clips[4] = dataclasses.replace(clips[4], audio=audio)
    folder = write_shards(tmp_path / "s", [clips])
    with pytest.raises(BadSampleError, match=clips[4].key) as error:
        one_epoch(folder)
    one_line(error)
    steps = one_epoch(folder, 0.5)
    bad = [error for step in steps for error in step.stats.bad_samples]
    assert [(error.place.key, error.kind) for error in bad] == [(clips[4].key, "audio")]
    assert len(ids_of(steps)) == 5
    assert all(bool(batch.waveforms.isfinite().all()) for step in steps for batch in step.micro_batches)


# 11, 12: few and uneven shards


def count_together(world: World, uneven: str, single: str, journal: str) -> None:
    """A rank's epoch over uneven shards, with a collective in each step, as training has one; then over one shard."""
    import torch
    import torch.distributed as dist

    stream = stream_of(ShardReader([uneven], RATE), world)
    for step in range(stream.steps_per_epoch):
        batches = next(stream)
        mine = torch.tensor([step, sum(batch.num_examples for batch in batches.micro_batches)])
        together = [torch.zeros_like(mine) for _ in range(world.size)]
        dist.all_gather(together, mine)
        assert {int(other[0]) for other in together} == {step}
        counts = sorted(int(other[1]) for other in together)
        assert counts[-1] - counts[0] <= 1
        assert sum(counts) == min(12, 74 - 12 * step)
    with stream_of(ShardReader([single], RATE), world, workers=2, end_step=3) as stream:
        steps = list(stream)
    assert len(steps) == 3
    Path(f"{journal}-{world.rank}").write_text("\n".join(ids_of(steps)))
    dist.barrier()


@pytest.mark.slow
def test_11_and_12_two_ranks_keep_step_on_uneven_shards_and_share_a_single_one(tmp_path: Path) -> None:
    """One start of two real ranks for both: with two loader processes each, on the single shard."""
    uneven = write_shards(tmp_path / "uneven", [simple_clips(n, clips) for n, clips in enumerate((10, 10, 10, 7))])
    single = write_shards(tmp_path / "single", [simple_clips(0, 15)])
    run_ranks(2, count_together, str(uneven), str(single), str(tmp_path / "journal"), seconds=120)
    found = [example for rank in range(2) for example in (tmp_path / f"journal-{rank}").read_text().split()]
    assert sorted(found) == all_ids(single)


def test_12_uneven_shards_give_every_rank_as_many_steps(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(n, clips) for n, clips in enumerate((10, 10, 10, 7))])
    for size in (1, 2, 3, 5):
        streams = [stream_of(ShardReader([folder], RATE), World(rank, size), end_step=7) for rank in range(size)]
        ranks = [list(stream) for stream in streams]
        assert {len(steps) for steps in ranks} == {7}
        assert Counter(example for steps in ranks for example in ids_of(steps)) == Counter(all_ids(folder))


# 13: shards that change under a run


def test_13_a_shard_replaced_on_resume_is_a_fingerprint_error(shards: Path, tmp_path: Path) -> None:
    state = next(stream_of(ShardReader([shards], RATE))).state
    clips = [simple_clips(n, count) for n, count in enumerate((10, 7, 4))]
    clips[1][3].questions[0] = ((), "another question", "another answer")
    other = write_shards(tmp_path / "other", clips)
    assert ShardReader([other], RATE).num_questions == ShardReader([shards], RATE).num_questions
    with pytest.raises(
        ShardError, match=quoted("data.shards have the fingerprint") + r" \w+, but the run .* was trained on"
    ) as error:
        stream_of(ShardReader([other], RATE), state=state)
    one_line(error)


def test_13_a_shard_replaced_after_the_start_never_gives_other_samples(shards: Path, tmp_path: Path) -> None:
    """The same counts and the same size: only the samples' checksums can tell."""
    clips = [simple_clips(n, count) for n, count in enumerate((10, 7, 4))]
    for clip in clips[0]:
        clip.first_value += 1
    other = write_shards(tmp_path / "other", clips)
    assert (other / TAR).stat().st_size == (shards / TAR).stat().st_size
    reader = ShardReader([shards], RATE)
    (other / TAR).replace(shards / TAR)
    with pytest.raises(
        BadSampleError, match=quoted("its checksum is not the one in the index") + ".*or was replaced"
    ) as error:
        reader.sample(0, 0)
    one_line(error)


def test_limits_of_memory_are_there_to_be_set() -> None:
    """What case 9 rests on."""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
