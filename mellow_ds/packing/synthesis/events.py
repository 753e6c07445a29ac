"""The sounds that the synthetic corpus is made of: twelve kinds, each a formula with drawn parameters.

Kinds are far apart on purpose (in pitch, bandwidth or course over time), so that a small network tells them apart after
minutes of training. Nothing here knows of clips, questions or files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mellow_ds.packing.synthesis.draws import log_uniform

FADE_SECONDS = 0.01  # of an event's edges; shorter ones click
STRIKE_FADE_SECONDS = 0.002  # of the start of sounds that begin with a stroke

# Frequencies of a bell's partials over its strike note (hum, prime, tierce, quint, nominal, ...), and their strengths
_BELL_PARTIALS = ((0.5, 0.6), (1.0, 1.0), (1.2, 0.7), (1.5, 0.4), (2.0, 0.9), (2.67, 0.4), (3.0, 0.3), (4.1, 0.2))


@dataclass(frozen=True)
class SoundEvent:
    """One sound with everything that was drawn for it; the same event gives the same samples."""

    name: str  # as people say it, with its article: "a bell"
    pitch_hz: float  # of a tone; the lower end of a sweep; the centre of a siren
    rate_hz: float  # repetitions a second of what repeats (ticks, echoes, the siren's turns, the trembling)
    sweep_octaves: float  # that a chirp passes through, or that a siren swings to each side
    phase: float  # radians
    noise_seed: int  # of the kinds that are noise or hold some


Formula = Callable[[SoundEvent, np.ndarray], np.ndarray]  # (event, seconds [S]) -> waveform [S] of any scale


@dataclass(frozen=True)
class EventKind:
    """What the events of one name have in common."""

    name: str
    formula: Formula
    peak: float  # of the waveform before the clip's level: makes the kinds about equally loud
    pitch_hz: tuple[float, float] = (1.0, 1.0)  # bounds of the draw
    rate_hz: tuple[float, float] = (1.0, 1.0)
    sweep_octaves: tuple[float, float] = (1.0, 1.0)
    struck: bool = False  # begins with a stroke, which a slow fade would soften


def draw_event(name: str, rng: np.random.Generator) -> SoundEvent:
    """An event of the kind `name` with parameters from `rng`."""
    kind = KINDS[name]
    return SoundEvent(
        name=name,
        pitch_hz=log_uniform(rng, kind.pitch_hz),
        rate_hz=log_uniform(rng, kind.rate_hz),
        sweep_octaves=log_uniform(rng, kind.sweep_octaves),
        phase=float(rng.uniform(0, 2 * np.pi)),
        noise_seed=int(rng.integers(2**62)),
    )


def event_waveform(event: SoundEvent, seconds: float, sample_rate: int) -> np.ndarray:
    """The event's samples [S] float64 at `sample_rate` Hz, faded at both ends, its peak that of its kind."""
    kind = KINDS[event.name]
    wave = kind.formula(event, np.arange(round(seconds * sample_rate)) / sample_rate)
    wave = wave * (kind.peak / np.abs(wave).max())
    return fade(wave, STRIKE_FADE_SECONDS if kind.struck else FADE_SECONDS, FADE_SECONDS, sample_rate)


def fade(wave: np.ndarray, in_seconds: float, out_seconds: float, sample_rate: int) -> np.ndarray:
    """`wave` with both ends brought to zero along a quarter of a sine."""
    num_in, num_out = round(in_seconds * sample_rate), round(out_seconds * sample_rate)
    gain = np.ones(len(wave))
    gain[:num_in] *= np.sin(0.5 * np.pi * np.arange(num_in) / num_in)
    gain[len(wave) - num_out :] *= np.sin(0.5 * np.pi * np.arange(num_out)[::-1] / num_out)
    return wave * gain


def _tone(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * event.pitch_hz * time + event.phase)


def _sweep(event: SoundEvent, position: np.ndarray, time: np.ndarray) -> np.ndarray:
    """A sine whose pitch is `position` (octaves above the event's pitch) at each moment; the phase is its integral."""
    pitch = event.pitch_hz * 2.0**position
    turns = (np.cumsum(pitch) - 0.5 * (pitch + pitch[0])) * (time[1] - time[0])  # trapezoids
    return np.sin(2 * np.pi * turns + event.phase)


def _rising_chirp(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    return _sweep(event, event.sweep_octaves * time / time[-1], time)


def _falling_chirp(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    return _sweep(event, event.sweep_octaves * (1 - time / time[-1]), time)


def _siren(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    return _sweep(event, event.sweep_octaves * np.sin(2 * np.pi * event.rate_hz * time + event.phase), time)


def _trembling_tone(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """Three harmonics that swell together: a pure tone, trembling, is too like a passing chirp or siren."""
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * event.rate_hz * time + event.phase)
    turns = 2 * np.pi * event.pitch_hz * time
    return swell * (np.sin(turns) + 0.6 * np.sin(2 * turns) + 0.4 * np.sin(3 * turns))


def _bell(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """Inharmonic partials, the higher the sooner gone."""
    wave = np.zeros(len(time))
    for ratio, strength in _BELL_PARTIALS:
        decay = np.exp(-time * 2.5 * ratio**0.5)
        wave += strength * decay * np.sin(2 * np.pi * ratio * event.pitch_hz * time + event.phase * ratio)
    return wave


def _buzz(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """A sawtooth from its harmonics up to 4 kHz, so that nothing folds back at 8 kHz sampling or above."""
    wave = np.zeros(len(time))
    for harmonic in range(1, int(3800 / event.pitch_hz) + 1):
        wave += np.sin(harmonic * (2 * np.pi * event.pitch_hz * time + event.phase)) / harmonic
    return wave


def _ticking(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """One short burst of noise, again and again at even distances, always as loud."""
    since_tick = np.mod(time, 1 / event.rate_hz)
    burst = np.random.default_rng(event.noise_seed).standard_normal(len(time))
    # rounded down, so that each tick begins with the same sample of the burst wherever it falls between two of the clip
    sample_of_tick = np.floor(since_tick / (time[1] - time[0]) + 1e-6).astype(int)
    return burst[np.minimum(sample_of_tick, len(time) - 1)] * np.exp(-since_tick / 0.004)


def _echo(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """A short note and its repetitions, each at 0.6 of the one before."""
    repetition, since_start = np.divmod(time, 1 / event.rate_hz)
    envelope = np.minimum(since_start / 0.004, 1) * np.exp(-since_start / 0.03)
    note = np.sin(2 * np.pi * event.pitch_hz * since_start) + 0.5 * np.sin(4 * np.pi * event.pitch_hz * since_start)
    return 0.6**repetition * envelope * note


def _white_noise(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    return np.random.default_rng(event.noise_seed).standard_normal(len(time))


def _brown_noise(event: SoundEvent, time: np.ndarray) -> np.ndarray:
    """White noise whose power falls with the square of the frequency; level below 60 Hz, where no speaker follows."""
    spectrum = np.fft.rfft(_white_noise(event, time))
    frequency = np.fft.rfftfreq(len(time), time[1] - time[0])
    return np.fft.irfft(spectrum / np.maximum(frequency, 60.0) * (frequency > 20), len(time))


KINDS: dict[str, EventKind] = {
    kind.name: kind
    for kind in (
        EventKind("a low tone", _tone, 0.5, pitch_hz=(150.0, 260.0)),
        EventKind("a high tone", _tone, 0.35, pitch_hz=(2200.0, 3400.0)),
        EventKind("a rising chirp", _rising_chirp, 0.4, pitch_hz=(350.0, 600.0), sweep_octaves=(2.0, 2.7)),
        EventKind("a falling chirp", _falling_chirp, 0.4, pitch_hz=(350.0, 600.0), sweep_octaves=(2.0, 2.7)),
        EventKind("a siren", _siren, 0.4, pitch_hz=(800.0, 1200.0), rate_hz=(3.0, 5.0), sweep_octaves=(0.4, 0.7)),
        EventKind("a trembling tone", _trembling_tone, 0.7, pitch_hz=(500.0, 750.0), rate_hz=(7.0, 11.0)),
        EventKind("a bell", _bell, 0.8, pitch_hz=(450.0, 900.0), struck=True),
        EventKind("a buzz", _buzz, 0.5, pitch_hz=(85.0, 140.0)),
        EventKind("ticking", _ticking, 0.8, rate_hz=(7.0, 14.0), struck=True),
        EventKind("an echo", _echo, 0.8, pitch_hz=(700.0, 1300.0), rate_hz=(4.0, 6.0), struck=True),
        EventKind("white noise", _white_noise, 0.5),
        EventKind("brown noise", _brown_noise, 0.7),
    )
}
NAMES: tuple[str, ...] = tuple(KINDS)
