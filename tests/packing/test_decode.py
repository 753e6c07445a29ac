"""Decoding: what comes out is the signal that went in, and no file costs more than its bounds."""

import io
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from mellow_ds.packing import decode
from mellow_ds.packing.decode import BadClip, pack_clip, read_header, read_source

RATE = 32_000


def sound(samples: np.ndarray, rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", "subtype": "PCM_16", **options})
    return buffer.getvalue()


def sine(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def packed(payload: bytes, codec: str = "flac") -> np.ndarray:
    audio, num_frames = pack_clip(payload, RATE, codec)
    samples, rate = soundfile.read(io.BytesIO(audio), dtype="int16")
    assert (rate, len(samples), samples.ndim) == (RATE, num_frames, 1)
    return samples


def reason_of(payload: bytes) -> str:
    with pytest.raises(BadClip) as caught:
        pack_clip(payload, RATE, "flac")
    return caught.value.reason


@pytest.mark.parametrize("codec", ["flac", "pcm"])
def test_16_bit_mono_at_the_stored_rate_comes_back_exactly(codec: str) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 5_000).astype(np.int16)
    np.testing.assert_array_equal(packed(sound(samples), codec), samples)


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(100, 1000), np.full(100, 3000)], axis=1).astype(np.int16)
    np.testing.assert_array_equal(packed(sound(stereo)), np.full(100, 2000))


def test_what_is_too_loud_is_clipped() -> None:
    loud = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=np.float32)
    np.testing.assert_array_equal(packed(sound(loud, subtype="FLOAT")), [-32768, -32768, 0, 32767, 32767])


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 44_101, 8_363])
def test_a_resampled_tone_is_the_same_tone(rate: int) -> None:
    samples = packed(sound(sine(440, 0.5, rate), rate)) / 32768
    assert abs(len(samples) - RATE // 2) <= 16  # 44,101 Hz and the like are rounded by a few parts in 10,000
    middle = slice(2_000, 14_000)
    np.testing.assert_allclose(samples[middle], sine(440, 0.5, RATE)[middle], atol=5e-3 if rate % 25 == 0 else 0.08)


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [("FLAC", "PCM_24", 44_100), ("OGG", "VORBIS", 44_100), ("OGG", "OPUS", 48_000), ("MP3", "MPEG_LAYER_III", 44_100)]
    + [("AIFF", "PCM_16", 22_050), ("WAV", "FLOAT", 32_000), ("WAV", "PCM_U8", 8_000), ("AU", "ULAW", 8_000)],
)
def test_what_libsndfile_reads_is_packed(form: str, subtype: str, rate: int) -> None:
    stereo = np.repeat(sine(440, 0.5, rate)[:, None], 2, axis=1)
    samples = packed(sound(stereo, rate, format=form, subtype=subtype)) / 32768
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert abs(np.argmax(spectrum) * RATE / len(samples) - 440) < 4
    assert abs(len(samples) / RATE - 0.5) < 0.01


@pytest.mark.parametrize("num_frames", [1, 2, 7])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_the_shortest_clips_are_packed(num_frames: int, rate: int) -> None:
    assert len(packed(sound(np.full(num_frames, 0.25), rate))) == -(-num_frames * RATE // rate)


def test_the_same_bytes_give_the_same_bytes() -> None:
    payload = sound(np.random.default_rng(1).uniform(-1, 1, (4_410, 2)), 44_100)
    assert pack_clip(payload, RATE, "flac") == pack_clip(payload, RATE, "flac")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_samples_that_are_not_finite_are_rejected(bad: float) -> None:
    samples = np.zeros((1_000, 2), dtype=np.float32)
    samples[-1, 1] = bad
    assert reason_of(sound(samples, subtype="FLOAT")) == "samples are not finite"


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAVEX", "PCM_24"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("W64", "PCM_16"),
    ]
    + [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
def test_half_a_file_is_rejected(form: str, subtype: str) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (48_000, 2))
    whole = sound(noise, 48_000, format=form, subtype=subtype)
    assert len(packed(whole)) > 0
    for part in (0.3, 0.5, 0.9):
        assert reason_of(whole[: int(part * len(whole))]) in ("cut short", "cannot be decoded", "no samples")


def test_a_wav_written_without_seeking_back_is_taken() -> None:
    payload = bytearray(sound(np.zeros(100, dtype=np.int16)))
    start = payload.index(b"data") + 4
    for declared in (0xFFFFFFFF, 0x7FFFFFFF):  # ffmpeg's and sox's length for a pipe
        payload[start : start + 4] = struct.pack("<I", declared)
        assert len(packed(bytes(payload))) == 100


@pytest.mark.parametrize("payload", [b"RIFF", b"text " * 1000, b"\0" * 100, b"ID3" + b"\xff" * 500, b"OggS", b"fLaC"])
def test_what_is_no_audio_is_rejected(payload: bytes) -> None:
    assert reason_of(payload) == "cannot be decoded"


def test_a_file_without_samples_is_rejected() -> None:
    assert reason_of(sound(np.zeros(0, dtype=np.int16))) == "no samples"


@pytest.mark.parametrize(
    ("channels", "rate", "reason"),
    [
        (33, 8_000, "too many channels"),
        (1_024, 8_000, "too many channels"),
        (1, 999, "sample rate out of bounds"),
        (1, 800_000, "sample rate out of bounds"),
    ],
)
def test_the_header_is_held_to_bounds(channels: int, rate: int, reason: str) -> None:
    assert reason_of(sound(np.zeros((10, channels), dtype=np.int16), rate)) == reason


def test_an_hour_of_silence_and_more_is_rejected_before_decoding() -> None:
    bomb = sound(np.zeros(3_601 * 1_000, dtype=np.int16), 1_000, format="FLAC")
    assert len(bomb) < 100_000
    tracemalloc.start()
    assert reason_of(bomb) == "too long"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("target", [8_000, 16_000, 32_000, 44_100, 48_000])
def test_no_rate_makes_a_large_filter(target: int) -> None:
    for rate in [*range(1_000, 768_001, 997), 44_101, 8_363, 767_999]:
        ratio = decode._rate_ratio(rate, target)
        assert ratio.numerator * ratio.denominator <= 2 * decode._KERNEL_ENTRIES
        assert abs(float(ratio) * rate / target - 1) < 1e-3
    assert float(decode._rate_ratio(44_100, 32_000)) == 32_000 / 44_100


def test_a_clip_too_large_for_a_member_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_MEMBER_BYTES", 1_000)
    assert reason_of(sound(np.random.default_rng(0).uniform(-1, 1, 2_000))) == "too large for a shard"


def test_files_that_are_none_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")  # opening it would wait for ever
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(decode.MAX_SOURCE_BYTES + 1)
    found = {}
    for name in ("missing", "empty", "folder", "pipe", "loop", "huge", "empty.wav/below"):
        with pytest.raises(BadClip) as caught:
            read_source(tmp_path / f"{name}.wav")
        found[name] = caught.value.reason
    assert found == {
        "missing": "file is missing",
        "empty": "file is empty",
        "folder": "not a plain file",
        "pipe": "not a plain file",
        "loop": "file cannot be read",
        "huge": "file is too large",
        "empty.wav/below": "file is missing",
    }


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)])
def test_mutated_files_are_packed_or_rejected(form: str, subtype: str | None) -> None:
    """A sample of the long run: no other exception, no crash, and what is packed is as long as its header said."""
    draw = random.Random(0)
    whole = sound(sine(300, 0.1, 16_000), 16_000, format=form, subtype=subtype)
    for _ in range(40):
        mutated = bytearray(whole)
        for _ in range(draw.choice((1, 4, 30))):
            mutated[draw.randrange(min(len(mutated), draw.choice((64, len(mutated)))))] = draw.randrange(256)
        try:
            num_frames = pack_clip(bytes(mutated), RATE, "flac")[1]
        except BadClip:
            continue
        header = read_header(bytes(mutated))
        assert abs(num_frames - header.frames_at(RATE)) <= 1 + num_frames // 1000


@pytest.mark.parametrize(("rate", "frames"), [(32_000, 1_000), (44_100, 4_411), (8_000, 1)])
def test_opus_is_stored_at_48_khz_and_counted_at_the_rate_asked_for(rate: int, frames: int) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(np.arange(frames) * 0.05), rate, format="WAV", subtype="PCM_16")
    first, num_frames = pack_clip(buffer.getvalue(), 32_000, "opus")
    with soundfile.SoundFile(io.BytesIO(first)) as sound:
        assert (sound.format, sound.subtype, sound.samplerate, sound.channels) == ("OGG", "OPUS", 48_000, 1)
        stored = len(sound.read())
    assert stored == -(-frames * 48_000 // rate)
    assert num_frames == -(-stored * 2 // 3)
    assert pack_clip(buffer.getvalue(), 32_000, "opus")[0] == first, "the same bytes again"


def test_opus_sounds_like_its_source() -> None:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 48_000, format="WAV", subtype="PCM_16")
    decoded = soundfile.read(io.BytesIO(pack_clip(buffer.getvalue(), 32_000, "opus")[0]))[0]
    assert np.corrcoef(decoded[2_000:-2_000], wave[2_000:-2_000])[0, 1] > 0.999


@pytest.mark.parametrize("frames", [1, 440, 441, 442, 50_000])
@pytest.mark.parametrize(("source", "target"), [(44_100, 32_000), (44_100, 48_000), (22_050, 32_000), (48_000, 32_000)])
def test_resampling_is_torchaudios(source: int, target: int, frames: int) -> None:
    mono = np.random.default_rng(frames).uniform(-1, 1, frames).astype(np.float32)
    wanted = torchaudio.transforms.Resample(source, target)(torch.from_numpy(mono)).numpy()
    found = decode.resample(mono, source, target)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=2e-6)
