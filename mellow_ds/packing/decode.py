"""One audio file to what a shard stores: bytes read, bounds checked before decoding, mono, resampled, 16-bit, encoded.

Decoding is libsndfile's (through soundfile), resampling torchaudio's; torch is imported only where it is needed. Every
fault of a file is a `BadClip` with a fixed reason. The same bytes give the same result, byte for byte.
"""

import io
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from mellow_ds.packing.ogg import with_fixed_serial
from mellow_ds.packing.settings import OPUS_SAMPLE_RATE
from mellow_ds.shard_format import MAX_MEMBER_BYTES

if TYPE_CHECKING:
    import torch

# Bounds of a source file. They keep a crafted header from costing memory or hours, and exclude nothing in use.
MAX_SOURCE_BYTES = 1024**3
MAX_CHANNELS = 32
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000  # Hz
MAX_SECONDS = 3_600
MAX_SOURCE_FRAMES = MAX_SECONDS * 48_000  # 0.7 GB of float32 mono; at higher rates the longest clip is shorter

_FILE_FORMATS = {"flac": ("FLAC", "PCM_16"), "pcm": ("WAV", "PCM_16"), "opus": ("OGG", "OPUS")}  # libsndfile's names
_LOUDEST = 2.0**32  # full scale is 1; a float file may hold integers as they are; beyond is noise in the bytes
_BLOCK_SAMPLES = 1 << 20  # decoded at a time, all channels together
_KERNEL_ENTRIES = 2_000_000  # of the resampling filter: 16 MB; unreduced, 44,101 to 32,000 Hz would take 11 GB
_MAX_TAPS_A_STEP = 1.5  # a window of the filter by its step: so much memory a matrix of all windows takes
_UNKNOWN_LENGTH = 0x7FFF0000  # a chunk length from here on is a placeholder of a writer that could not seek back


class BadClip(Exception):
    """An audio file that cannot be packed."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Header:
    """What the header of an audio file says."""

    sample_rate: int  # Hz
    num_channels: int
    num_frames: int

    def frames_at(self, sample_rate: int) -> int:
        """Frames after resampling, as an estimate."""
        return frames_after(self.num_frames, self.sample_rate, sample_rate)


def frames_after(num_frames: int, source_rate: int, target_rate: int) -> int:
    """Frames that resampling makes of `num_frames`: as many as begin before the end."""
    return -(-num_frames * target_rate // source_rate)


def read_source(path: Path) -> bytes:
    """The bytes of an audio file; `BadClip` where there is no plain, non-empty file of bounded size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise BadClip("not a plain file")
        if status.st_size > MAX_SOURCE_BYTES:
            raise BadClip("file is too large", f"{status.st_size} bytes; at most {MAX_SOURCE_BYTES}")
        payload = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadClip("file is missing") from None
    except OSError as error:
        raise BadClip("file cannot be read", error.strerror or "") from None
    if not payload:
        raise BadClip("file is empty")
    return payload


def read_header(payload: bytes) -> Header:
    """The header of an audio file, within bounds and with all the bytes that it announces; else `BadClip`."""
    with _open_sound(payload) as sound:
        return _checked_header(sound, payload)


def decode_mono(payload: bytes) -> tuple[np.ndarray, int]:
    """([frames] float32, rate in Hz), the mean of the channels; `BadClip` where it is not all there or not finite."""
    with _open_sound(payload) as sound:
        header = _checked_header(sound, payload)
        mono = np.empty(header.num_frames, dtype=np.float32)
        num_read, block_frames = 0, max(_BLOCK_SAMPLES // header.num_channels, 1)
        while num_read < header.num_frames:
            found = _read_block(sound, header.num_channels, mono[num_read : num_read + block_frames])
            if not found:
                raise BadClip("cut short", f"{num_read} frames of {header.num_frames}")
            num_read += found
    return mono, header.sample_rate


def _checked_header(sound: Any, payload: bytes) -> Header:
    header = Header(sound.samplerate, sound.channels, sound.frames)
    _check_bounds(header)
    _check_complete(payload, sound.extra_info)
    return header


def _read_block(sound: Any, num_channels: int, out: np.ndarray) -> int:
    """Fill `out` with the mean of the channels of the next frames; returns how many there were."""
    # one channel is decoded right where it is to be: a block of its own, copied, took a third longer
    if num_channels == 1:
        block = sound.read(dtype="float32", out=out)
    else:
        block = sound.read(len(out), dtype="float32", always_2d=True)
    if len(block) and not (block.max() < _LOUDEST and block.min() > -_LOUDEST):  # false for NaN too
        raise BadClip("samples are not finite")
    if num_channels > 1:
        out[: len(block)] = block.mean(axis=1)
    return len(block)


def resample(mono: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """[frames] float32 at `target_rate` (torchaudio's windowed sinc, default width and roll-off)."""
    ratio = _rate_ratio(source_rate, target_rate)
    if ratio == 1:
        return mono
    import torch

    resampler: Any = _resampler(ratio)
    with torch.no_grad():
        num_taps = resampler.kernel.shape[-1]
        if num_taps > _MAX_TAPS_A_STEP * ratio.denominator:
            return resampler(torch.from_numpy(mono)).numpy()
        # the same filter as one matrix product: the convolution that torchaudio asks for takes half as long again
        padded = torch.nn.functional.pad(torch.from_numpy(mono), (resampler.width, resampler.width + ratio.denominator))
        windows = padded.unfold(0, num_taps, ratio.denominator).contiguous()
        resampled = torch.mm(windows, resampler.kernel[:, 0].T).flatten()
        return resampled[: frames_after(len(mono), ratio.denominator, ratio.numerator)].numpy()


def to_int16(mono: np.ndarray) -> np.ndarray:
    """[frames] int16 of a signal in -1 .. 1; what is louder is clipped. 16-bit sources come back exactly."""
    scaled = mono * 32768.0
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype(np.int16)


def encode(samples: np.ndarray, sample_rate: int, codec: str) -> bytes:
    """A FLAC, WAV or Ogg/Opus file of [frames] int16; `BadClip` where it is too long for a member of a shard."""
    buffer = io.BytesIO()
    file_format, subtype = _FILE_FORMATS[codec]
    soundfile.write(buffer, samples, sample_rate, format=file_format, subtype=subtype)
    payload = buffer.getvalue()
    if codec == "opus":
        payload = with_fixed_serial(payload)
    if len(payload) > MAX_MEMBER_BYTES:
        raise BadClip("too large for a shard", f"{len(payload)} bytes as {codec}; at most {MAX_MEMBER_BYTES}")
    return payload


def pack_clip(payload: bytes, sample_rate: int, codec: str) -> tuple[bytes, int]:
    """(encoded audio, frames at `sample_rate`) of a source file's bytes, as a shard stores it.

    Opus is stored at 48 kHz, so its frames are those that resampling it on reading gives. `BadClip` where the file
    cannot be packed.
    """
    mono, source_rate = decode_mono(payload)
    stored_rate = OPUS_SAMPLE_RATE if codec == "opus" else sample_rate
    samples = to_int16(resample(mono, source_rate, stored_rate))
    return encode(samples, stored_rate, codec), frames_after(len(samples), stored_rate, sample_rate)


@contextmanager
def _open_sound(payload: bytes) -> Iterator[Any]:
    try:
        # from memory: no file name from which libsndfile would guess a headerless format
        with soundfile.SoundFile(io.BytesIO(payload)) as sound:
            yield sound
    except (RuntimeError, TypeError, ValueError) as error:
        # the message itself holds a memory address
        raise BadClip("cannot be decoded", getattr(error, "error_string", type(error).__name__)) from None


def _check_bounds(header: Header) -> None:
    if header.num_frames <= 0:
        raise BadClip("no samples")
    if not 1 <= header.num_channels <= MAX_CHANNELS:
        raise BadClip("too many channels", f"{header.num_channels}; at most {MAX_CHANNELS}")
    if not MIN_SOURCE_RATE <= header.sample_rate <= MAX_SOURCE_RATE:
        raise BadClip(
            "sample rate out of bounds", f"{header.sample_rate} Hz; {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} are read"
        )
    if header.num_frames >= 2**62:  # libsndfile's way to say that the header gives no length
        raise BadClip("no length in the header", "write the file anew with its length")
    if header.num_frames > min(MAX_SECONDS * header.sample_rate, MAX_SOURCE_FRAMES):
        seconds = header.num_frames / header.sample_rate
        raise BadClip("too long", f"{seconds:.0f} s at {header.sample_rate} Hz; at most 1 hour at 48000 Hz")


def _check_complete(payload: bytes, log: str) -> None:
    """libsndfile takes half a WAV, AIFF or Ogg as a shorter clip and says so in its log at most."""
    for declared, found in re.findall(r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", log, re.M):
        if int(found) < int(declared) < _UNKNOWN_LENGTH:
            raise BadClip("cut short", f"{found} bytes of {declared}")
    if payload[:4] == b"OggS":
        _check_last_page(payload)


def _check_last_page(payload: bytes) -> None:
    """An Ogg page (RFC 3533): 27 bytes of header, the last the number of segments; their lengths; the segments."""
    start = payload.rfind(b"OggS")
    lengths = payload[start + 27 : start + 27 + payload[start + 26]] if len(payload) > start + 26 else b""
    end = start + 27 + len(lengths) + sum(lengths)
    if not lengths or end > len(payload):
        raise BadClip("cut short", "the last Ogg page is not whole")


def _rate_ratio(source_rate: int, target_rate: int) -> Fraction:
    """target / source, rounded where its terms are so large that the filter would not fit into memory.

    Exact for all usual rates; else pitch and length change by less than one part in 1,000.
    """
    ratio = Fraction(target_rate, source_rate)
    if ratio.numerator * ratio.denominator <= _KERNEL_ENTRIES:
        return ratio
    return ratio.limit_denominator(max(isqrt(int(_KERNEL_ENTRIES / ratio)), 1))


@lru_cache(maxsize=32)
def _resampler(ratio: Fraction) -> "torch.nn.Module":
    from torchaudio.transforms import Resample

    return Resample(ratio.denominator, ratio.numerator)
