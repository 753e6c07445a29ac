"""Each formula is measured from its samples: pitch, course of the pitch, repetition rate, slope of the spectrum."""

import dataclasses

import numpy as np
import pytest

from mellow_ds.packing.synthesis.draws import stream
from mellow_ds.packing.synthesis.events import KINDS, NAMES, SoundEvent, draw_event, event_waveform

RATE = 16_000
DRAWS = range(4)


def drawn(name: str, draw: int, seconds: float = 1.5) -> tuple[SoundEvent, np.ndarray]:
    """An event of that kind and its samples."""
    event = draw_event(name, stream("events test", draw))
    return event, event_waveform(event, seconds, RATE)


def spectrum_peak_hz(wave: np.ndarray) -> float:
    """Frequency of the strongest bin of a windowed transform: to 0.5 Hz for a whole event, to 4 Hz for a frame."""
    size = 1 << 15 if len(wave) > 4096 else 1 << 12
    return float(np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave)), size)))) * RATE / size


def pitch_track_hz(wave: np.ndarray, frame: int = 512, hop: int = 128) -> np.ndarray:
    """Strongest frequency of each frame."""
    starts = range(0, len(wave) - frame, hop)
    return np.array([spectrum_peak_hz(wave[start : start + frame]) for start in starts])


def envelope(wave: np.ndarray, hop: int = 80) -> np.ndarray:
    """Root mean square of each 5 ms."""
    return np.sqrt((wave[: len(wave) // hop * hop].reshape(-1, hop) ** 2).mean(1))


def repetition_hz(course: np.ndarray, steps_a_second: float, bounds: tuple[float, float]) -> float:
    """Strongest periodicity of a course over time within bounds, from its transform."""
    magnitude = np.abs(np.fft.rfft((course - course.mean()) * np.hanning(len(course)), 1 << 15))
    frequency = np.fft.rfftfreq(1 << 15, 1 / steps_a_second)
    inside = (frequency >= bounds[0]) & (frequency <= bounds[1])
    return float(frequency[inside][np.argmax(magnitude[inside])])


def loudness_slope_db(wave: np.ndarray) -> float:
    """Decibels an octave that the power density rises by, fitted over 125 Hz to 4 kHz."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequency = np.fft.rfftfreq(len(wave), 1 / RATE)
    edges = 125.0 * 2.0 ** np.arange(6)
    levels = [10 * np.log10(power[(frequency >= e) & (frequency < 2 * e)].mean()) for e in edges[:-1]]
    return float(np.polyfit(np.arange(5), levels, 1)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_event_is_finite_faded_and_as_loud_as_its_kind(name):
    for draw in DRAWS:
        event, wave = drawn(name, draw)
        assert wave.shape == (24_000,)
        assert np.isfinite(wave).all()
        assert 0.5 * KINDS[name].peak < np.abs(wave).max() <= KINDS[name].peak + 1e-9
        assert abs(wave[0]) < 1e-9
        assert abs(wave[-1]) < 1e-9
        assert np.array_equal(wave, event_waveform(event, 1.5, RATE))


@pytest.mark.parametrize("name", NAMES)
def test_drawn_parameters_differ_and_keep_their_bounds(name):
    events = [draw_event(name, stream("bounds", draw)) for draw in range(50)]
    kind = KINDS[name]
    for field in ("pitch_hz", "rate_hz", "sweep_octaves"):
        low, high = getattr(kind, field)
        values = [getattr(event, field) for event in events]
        assert low <= min(values) <= max(values) <= high
        assert low == high or len(set(values)) == len(values)
    waves = [event_waveform(event, 0.5, RATE) for event in events[:5]]
    assert all(not np.allclose(waves[0], other, atol=1e-3) for other in waves[1:])


@pytest.mark.parametrize("name", ["a low tone", "a high tone", "a trembling tone"])
def test_tones_sound_at_their_pitch(name):
    for draw in DRAWS:
        event, wave = drawn(name, draw)
        assert abs(spectrum_peak_hz(wave) - event.pitch_hz) < 1.0


@pytest.mark.parametrize(("name", "direction"), [("a rising chirp", 1), ("a falling chirp", -1)])
def test_chirps_go_the_way_they_are_called_through_their_octaves(name, direction):
    for draw in DRAWS:
        event, wave = drawn(name, draw)
        octaves = np.log2(pitch_track_hz(wave) / event.pitch_hz)[4:-4]
        assert (np.diff(octaves) * direction > -0.06).all()
        slope = np.polyfit(np.arange(len(octaves)) * 128 / RATE, octaves, 1)[0]
        assert abs(slope - direction * event.sweep_octaves / 1.5) < 0.05


def test_a_siren_turns_at_its_rate_around_its_centre():
    for draw in DRAWS:
        event, wave = drawn("a siren", draw)
        octaves = np.log2(pitch_track_hz(wave) / event.pitch_hz)[4:-4]
        assert abs(repetition_hz(octaves, RATE / 128, (1, 12)) - event.rate_hz) < 0.25
        assert abs((octaves.max() - octaves.min()) / 2 - event.sweep_octaves) < 0.12


def test_trembling_swells_at_its_rate_and_a_steady_tone_does_not():
    for draw in DRAWS:
        event, wave = drawn("a trembling tone", draw)
        assert abs(repetition_hz(envelope(wave), 200, (2, 20)) - event.rate_hz) < 0.25
        _, steady = drawn("a low tone", draw)
        level = envelope(steady, 800)[2:-2]
        assert level.std() / level.mean() < 0.1 < envelope(wave)[10:-10].std() / envelope(wave).mean()


def test_ticks_come_at_their_rate_and_equally_loud():
    for draw in DRAWS:
        event, wave = drawn("ticking", draw)
        level = envelope(wave, 16)  # of each millisecond
        likeness = np.correlate(level, level, "full")[len(level) - 1 :]  # with itself, that many milliseconds later
        assert abs(50 + np.argmax(likeness[50:170]) - 1000 / event.rate_hz) <= 1
        starts = [round(k * RATE / event.rate_hz) for k in range(1, int(1.45 * event.rate_hz))]
        strengths = [(wave[start - 2 : start + 400] ** 2).sum() for start in starts]
        assert min(strengths) > 0.95 * max(strengths)
        assert sum(strengths) > 0.8 * (wave**2).sum()  # the first, faded in, and the last are left out


def test_an_echo_repeats_weaker_each_time():
    for draw in DRAWS:
        event, wave = drawn("an echo", draw)
        period = 1 / event.rate_hz
        spans = [wave[round(i * period * RATE) : round((i * period + 0.1) * RATE)] for i in range(5)]
        strengths = [np.sqrt((span**2).mean()) for span in spans]
        ratios = np.array(strengths[1:]) / strengths[:-1]
        assert np.allclose(ratios, 0.6, atol=0.03)


def test_a_bell_decays_and_its_partials_are_not_multiples_of_one_pitch():
    for draw in DRAWS:
        event, wave = drawn("a bell", draw)
        level = envelope(wave, 800)
        assert level[-2] < 0.25 * level[1]
        magnitude = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 4 * RATE))

        def strength(ratio: float, event: SoundEvent = event, magnitude: np.ndarray = magnitude) -> float:
            return magnitude[round(4 * ratio * event.pitch_hz) + np.arange(-12, 13)].max()

        assert strength(1.2) > 5 * strength(
            1.35
        )  # a minor third over the strike note, nothing between it and the fifth
        assert strength(2.67) > 5 * strength(2.33)


def test_a_buzz_has_the_harmonics_of_a_sawtooth():
    for draw in DRAWS:
        event, wave = drawn("a buzz", draw)
        magnitude = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 4 * RATE))
        strengths = [magnitude[round(4 * n * event.pitch_hz) + np.arange(-8, 9)].max() for n in (1, 2, 5, 10)]
        assert np.allclose(np.array(strengths) / strengths[0], [1, 1 / 2, 1 / 5, 1 / 10], rtol=0.05)
        # nothing above 4 kHz to fold back
        assert (np.abs(np.fft.rfft(wave))[round(4200 * 1.5) :] ** 2).sum() < 1e-4 * (wave**2).sum() * len(wave) / 2


@pytest.mark.parametrize(("name", "slope_db"), [("white noise", 0.0), ("brown noise", -6.02)])
def test_noise_has_the_slope_of_its_colour(name, slope_db):
    for draw in DRAWS:
        _, wave = drawn(name, draw)
        assert abs(loudness_slope_db(wave) - slope_db) < 0.8


def test_the_formula_is_of_time_not_of_samples():
    """At another sampling rate the same event has the same pitch and course."""
    for name in ("a siren", "a bell", "a rising chirp", "an echo"):
        event = draw_event(name, stream("rates"))
        low, high = event_waveform(event, 1.0, 16_000), event_waveform(event, 1.0, 48_000)
        assert np.corrcoef(low[100:-200], high[::3][100:-200])[0, 1] > 0.98


def test_only_what_was_drawn_matters():
    event, wave = drawn("white noise", 0)
    other = dataclasses.replace(event, noise_seed=event.noise_seed + 1)
    assert abs(np.corrcoef(wave, event_waveform(other, 1.5, RATE))[0, 1]) < 0.05
