"""Windows of decoded audio against soundfile's own reading, and audio that is not what the index says."""

import io
import struct

import numpy as np
import pytest
import soundfile
import torch

from mellow_ds.data.audio import AudioError, crop_start, decode_clip, decode_window
from tests.data.made_shards import RATE, encode_audio

SAMPLES = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)


def window(audio: bytes, start: int, length: int, num_frames: int = len(SAMPLES)) -> np.ndarray:
    out = np.full(length, 9, dtype=np.int16)
    decode_window(memoryview(audio), RATE, num_frames, start, out)
    return out / np.float32(32768)


@pytest.mark.parametrize("codec", ["flac", "pcm"])
@pytest.mark.parametrize(("start", "length"), [(0, 5000), (0, 100), (4321, 400), (0, 6000), (4900, 300)])
def test_a_window_is_that_part_of_the_clip(codec: str, start: int, length: int) -> None:
    audio = encode_audio(SAMPLES, codec)
    whole, _ = soundfile.read(io.BytesIO(audio), dtype="float32")
    expected = np.zeros(length, dtype=np.float32)
    part = whole[start : start + length]
    expected[: len(part)] = part
    np.testing.assert_array_equal(window(audio, start, length), expected)


def test_flac_and_pcm_give_the_same_floats_in_range() -> None:
    flac, pcm = (decode_clip(memoryview(encode_audio(SAMPLES, codec)), RATE, 5000) for codec in ("flac", "pcm"))
    np.testing.assert_array_equal(flac, pcm)
    np.testing.assert_array_equal(flac, SAMPLES / np.float32(32768))


def test_a_wav_with_a_chunk_before_the_data_goes_through_the_decoder() -> None:
    plain = encode_audio(SAMPLES, "pcm")
    at = plain.index(b"data")
    extended = plain[:at] + b"LIST" + struct.pack("<I", 4) + b"INFO" + plain[at:]
    extended = extended[:4] + struct.pack("<I", len(extended) - 8) + extended[8:]
    np.testing.assert_array_equal(window(extended, 10, 50), SAMPLES[10:60] / np.float32(32768))


def as_file(samples: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str | None = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


NOISE = SAMPLES / 32768


def smooth_clip(seconds: float) -> np.ndarray:
    """Two tones and a little noise at 48 kHz, which Opus keeps."""
    time = np.arange(round(seconds * 48_000)) / 48_000
    noise = np.random.default_rng(1).normal(size=len(time))
    return 0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1760 * time) + 0.003 * noise


@pytest.mark.parametrize("rate", [32_000, 48_000, 16_000, 44_100])
def test_windows_of_opus_are_pieces_of_one_decoded_clip(rate: int) -> None:
    """Against decoding and resampling the whole file, and against the clip that went in."""
    from torchaudio.functional import resample

    clip = smooth_clip(1.3)
    payload = as_file(clip, rate=48_000, form="OGG", subtype="OPUS")
    decoded = torch.from_numpy(soundfile.read(io.BytesIO(payload), dtype="float32")[0])
    whole = resample(decoded, 48_000, rate).numpy() if rate != 48_000 else decoded.numpy()
    num_frames = len(whole)
    for start, length in ((0, num_frames), (0, 1000), (777, 4096), (num_frames - 500, 500), (num_frames - 300, 900)):
        out = np.empty(length, dtype=np.int16)
        decode_window(memoryview(payload), rate, num_frames, start, out)
        kept = min(length, num_frames - start)
        np.testing.assert_allclose(out[:kept] / 32768, whole[start : start + kept], atol=1 / 32768)
        assert not out[kept:].any()
    wanted = resample(torch.from_numpy(clip), 48_000, rate).numpy() if rate != 48_000 else clip
    error = whole[2000:-2000] - wanted[2000 : len(whole) - 2000]
    assert np.sqrt((error**2).mean()) < 0.05 * np.sqrt((wanted**2).mean())


def test_opus_of_another_length_is_refused() -> None:
    payload = as_file(smooth_clip(0.5), rate=48_000, form="OGG", subtype="OPUS")
    out = np.empty(100, dtype=np.int16)
    decode_window(memoryview(payload), 32_000, 16_000, 0, out)
    for wrong in (15_999, 16_001):
        with pytest.raises(AudioError, match="when resampled"):
            decode_window(memoryview(payload), 32_000, wrong, 0, out)


@pytest.mark.parametrize(
    ("audio", "problem"),
    [
        (as_file(NOISE[:4000]), "4000 frames, the index says 5000"),
        (as_file(NOISE[:4000], form="FLAC"), "4000 frames, the index says 5000"),
        (as_file(NOISE, rate=16_000), "16000 Hz, the index says 8000"),
        (as_file(np.stack([NOISE] * 2, 1)), "2 channels, the index says 1"),
        (as_file(np.stack([NOISE] * 8, 1), form="FLAC"), "8 channels"),
        (as_file(NOISE, form="OGG", subtype="VORBIS"), "it is OGG, not FLAC, WAV or Opus"),
        (as_file(np.where(np.arange(5000) == 7, np.nan, NOISE), subtype="FLOAT"), "not finite"),
        (as_file(NOISE[:0]), "0 frames"),
        (as_file(NOISE, form="FLAC")[:3000], "frames in the window|does not decode"),
        (as_file(NOISE)[:3000], "frames, the index says 5000|does not decode"),
        (b"", "does not decode"),
        (b"RIFF", "does not decode"),
        (b"import os; os.system('true')" * 9, "does not decode"),
    ],
)
def test_audio_that_is_not_what_the_index_says_is_refused(audio: bytes, problem: str) -> None:
    with pytest.raises(AudioError, match=problem):
        window(audio, 0, 5000)


def test_a_thousand_channels_and_an_endless_clip_are_refused_before_decoding() -> None:
    header = b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1024, RATE, 1, 2048, 16)
    with pytest.raises(AudioError):
        window(header + b"data" + struct.pack("<I", 4096) + bytes(4096), 0, 10)
    with pytest.raises(AudioError, match="more than"):
        decode_clip(memoryview(b""), RATE, 2**32 - 1)


def test_mutated_files_are_refused_or_read_but_never_worse() -> None:
    random = np.random.default_rng(5)
    for codec in ("flac", "pcm"):
        good = np.frombuffer(encode_audio(SAMPLES, codec), dtype=np.uint8)
        for _ in range(300):
            bad = good.copy()
            bad[random.integers(0, 120 if random.random() < 0.5 else len(bad), 3)] = random.integers(0, 256, 3)
            try:
                out = window(bad.tobytes(), 100, 1000)
            except AudioError:
                continue
            assert np.isfinite(out).all()
            assert np.abs(out).max() <= 1


def test_the_crop_is_a_function_of_seed_epoch_and_clip() -> None:
    starts = {crop_start(1000, 400, 1, epoch, key) for epoch in range(40) for key in ("a", "b")}
    assert len(starts) > 60
    assert 0 <= min(starts) < 60
    assert 540 < max(starts) <= 600
    assert crop_start(1000, 400, 1, 3, "a") == crop_start(1000, 400, 1, 3, "a") != crop_start(1000, 400, 2, 3, "a")
    assert crop_start(1000, 400, None, 3, "a") == 0
    assert crop_start(400, 400, 1, 3, "a") == crop_start(10, 400, 1, 3, "a") == 0
    assert {crop_start(401, 400, seed, 0, "a") for seed in range(50)} == {0, 1}
