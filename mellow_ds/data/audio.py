"""From a sample's compressed audio to the window of 16-bit samples that the encoder sees. Nothing else is decoded.

Only the window is decoded, of Opus also what stands before it. What a decoder finds is held against the index before a
sample is taken from it: libsndfile itself reads half a file, an empty one or 1,024 channels without complaint.
"""

import io
import struct
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import soundfile

from mellow_ds.prompt import draw_number

INT16_SCALE = 1 / 32768  # of a sample; a power of two: 16-bit audio becomes floats without rounding
_OPUS_RATE = 48_000  # Hz, at which every Opus stream is decoded
_OPUS_MARGIN = 128  # samples around a window that resampling looks at: more than the filter's 6 zero crossings are wide
_WAV_PCM = 1  # format tag; WAV of other forms is left to libsndfile
_MAX_CLIP_FRAMES = 2**28  # 1 GB of float32, 2 hours at 32 kHz: a longer clip is damage or a decompression bomb


class AudioError(ValueError):
    """Audio that is not what the index says; the caller knows the sample's name."""


def crop_start(num_frames: int, window: int, seed: int | None, epoch: int, key: str) -> int:
    """First sample of the window in a clip of `num_frames`: 0 in evaluation (seed None) and where nothing is left over.

    In training a function of (seed, epoch, clip), so that questions about one clip share its crop.
    """
    if seed is None or num_frames <= window:
        return 0
    return draw_number("crop", seed, epoch, key) % (num_frames - window + 1)


def decode_window(audio: memoryview, sample_rate: int, num_frames: int, start: int, out: np.ndarray) -> None:
    """Fill `out` (int16 [window]) with the clip from `start` on, zeros behind its end.

    `audio` is a mono FLAC or WAV file of `sample_rate` Hz and `num_frames` samples, or Ogg Opus that comes to that when
    it is resampled; raises `AudioError` where not.
    """
    length = min(len(out), num_frames - start)
    samples = _plain_pcm(audio, sample_rate)
    if samples is not None:
        _expect("frames", len(samples), num_frames)
        out[:length] = samples[start : start + length]
    else:
        _decode(audio, sample_rate, num_frames, start, out[:length])
    out[length:] = 0


def decode_clip(audio: memoryview, sample_rate: int, num_frames: int) -> np.ndarray:
    """The whole clip, float32 [num_frames] in -1 .. 1; raises `AudioError` as `decode_window` does."""
    if num_frames > _MAX_CLIP_FRAMES:
        raise AudioError(f"it has {num_frames} frames, more than the {_MAX_CLIP_FRAMES} that are decoded at once")
    samples = np.empty(num_frames, dtype=np.int16)
    decode_window(audio, sample_rate, num_frames, 0, samples)
    return samples * np.float32(INT16_SCALE)


def _decode(audio: memoryview, sample_rate: int, num_frames: int, start: int, out: np.ndarray) -> None:
    """Fill `out` through libsndfile."""
    try:
        with soundfile.SoundFile(io.BytesIO(audio)) as file:
            is_opus = (file.format, file.subtype) == ("OGG", "OPUS")
            if file.format not in ("FLAC", "WAV") and not is_opus:
                raise AudioError(f"it is {file.format}, not FLAC, WAV or Opus")
            _expect("channels", file.channels, 1)
            if is_opus:
                _decode_opus(file, sample_rate, num_frames, start, out)
                return
            _expect("Hz", file.samplerate, sample_rate)
            _expect("frames", file.frames, num_frames)
            file.seek(start)
            if file.subtype == "PCM_16":
                found = len(file.read(dtype="int16", out=out))
            else:  # not of our making
                decoded = file.read(len(out), dtype="float32")
                found = len(decoded)
                out[:found] = _to_int16(decoded)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(f"it does not decode ({error})") from None
    _expect("frames in the window", found, len(out))


def _decode_opus(file: soundfile.SoundFile, sample_rate: int, num_frames: int, start: int, out: np.ndarray) -> None:
    """Fill `out` from an Opus stream, decoded from its beginning (after a jump it is not exact) and resampled."""
    _expect("Hz", file.samplerate, _OPUS_RATE)
    ratio = Fraction(_OPUS_RATE, sample_rate)
    _expect(f"frames when resampled from {file.frames}", ceil(file.frames / ratio), num_frames)
    # both ends on a sample of the two rates, so that every window has the same samples where it overlaps another
    step = ratio.denominator
    first = max(start - _OPUS_MARGIN, 0) // step * step
    last = -(-(start + len(out) + _OPUS_MARGIN) // step) * step
    decoded = file.read(int(last * ratio), dtype="float32")[int(first * ratio) :]
    resampled = _resample(decoded, ratio)[start - first : start - first + len(out)]
    _expect("frames in the window", len(resampled), len(out))
    out[:] = _to_int16(resampled)


def _to_int16(samples: np.ndarray) -> np.ndarray:
    """[frames] int16 of floats; what is louder than full scale is clipped, as a lossy codec may make it."""
    if not np.isfinite(samples).all():
        raise AudioError("it holds samples that are not finite")
    return np.clip(np.rint(samples / np.float32(INT16_SCALE)), -32768, 32767).astype(np.int16)


def _resample(samples: np.ndarray, ratio: Fraction) -> np.ndarray:
    """[frames] at 1 / `ratio` of the rate, by torchaudio's windowed sinc, as in packing."""
    if ratio == 1:
        return samples
    import torch

    with torch.no_grad():
        return _resampler(ratio)(torch.from_numpy(samples)).numpy()


@lru_cache(maxsize=4)
def _resampler(ratio: Fraction) -> Any:
    from torchaudio.transforms import Resample

    return Resample(ratio.numerator, ratio.denominator)


def _expect(quantity: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise AudioError(f"it has {found} {quantity}, the index says {wanted}")


def _plain_pcm(audio: memoryview, sample_rate: int) -> np.ndarray | None:
    """The int16 samples of a mono 16-bit PCM WAV as a view of `audio`; None where it is anything else."""
    if len(audio) < 44 or audio[:4] != b"RIFF" or audio[8:16] != b"WAVEfmt ":
        return None
    format_bytes, tag, channels, rate, _, _, bits = struct.unpack_from("<IHHIIHH", audio, 16)
    position = 20 + format_bytes
    if (tag, channels, rate, bits) != (_WAV_PCM, 1, sample_rate, 16) or len(audio) < position + 8:
        return None
    name, num_bytes = struct.unpack_from("<4sI", audio, position)
    if name != b"data" or position + 8 + num_bytes > len(audio):
        return None
    return np.frombuffer(audio, dtype="<i2", count=num_bytes // 2, offset=position + 8)
