"""What stands in one synthetic clip: one event alone, two in sequence, or two at the same time; and its samples.

A scene is drawn from (seed, split, number of the clip) and holds all that was drawn, so questions are made from scenes
and audio is made from scenes, apart from each other.
"""

from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from mellow_ds.packing.synthesis.draws import balanced_choice, stream
from mellow_ds.packing.synthesis.events import FADE_SECONDS, NAMES, SoundEvent, draw_event, event_waveform, fade

MAX_CLIP_SECONDS = 2.4  # no clip is longer: a model's window of this length never cuts a sound off
MIN_CLIP_SECONDS = 2.2
MAX_PEAK = 0.9  # of full scale
LEVEL_DB = (-9.0, 0.0)  # of a whole clip
BALANCE_DB = (-2.0, 2.0)  # of the second event over the first
BACKGROUND_DB = (-75.0, -50.0)  # of the white noise under everything, over full scale

ALONE, SEQUENCE, TOGETHER = "alone", "sequence", "together"
_ARRANGEMENTS = (ALONE, ALONE, SEQUENCE, TOGETHER)  # half of the clips hold one sound, half hold two
_ORDERED_PAIRS = tuple(permutations(NAMES, 2))
_PAIRS = tuple(combinations(NAMES, 2))


@dataclass(frozen=True)
class PlacedEvent:
    """An event in its place."""

    event: SoundEvent
    onset_seconds: float
    seconds: float
    gain_db: float


@dataclass(frozen=True)
class Scene:
    """One clip, as drawn."""

    split: str
    number: int  # 0 .. clips of the split - 1
    arrangement: str  # ALONE, SEQUENCE or TOGETHER
    placed: tuple[PlacedEvent, ...]  # one or two; in a sequence in the order of sounding
    seconds: float
    level_db: float
    background_db: float
    background_seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """What is heard; in a sequence in the order of sounding."""
        return tuple(placed.event.name for placed in self.placed)

    @property
    def caption(self) -> str:
        """The scene in words."""
        if self.arrangement == SEQUENCE:
            return " followed by ".join(self.names)
        if self.arrangement == TOGETHER:
            return " and ".join(self.names) + " at the same time"
        return self.names[0]


def draw_scenes(seed: int, split: str, num_clips: int) -> list[Scene]:
    """The scenes of a split. A longer list begins with the shorter one; kinds and arrangements are balanced."""
    choices = {ALONE: tuple((name,) for name in NAMES), SEQUENCE: _ORDERED_PAIRS, TOGETHER: _PAIRS}
    num_drawn = dict.fromkeys(choices, 0)
    scenes = []
    for number in range(num_clips):
        arrangement = balanced_choice(_ARRANGEMENTS, number, seed, split, "arrangement")
        names = balanced_choice(choices[arrangement], num_drawn[arrangement], seed, split, arrangement)
        num_drawn[arrangement] += 1
        scenes.append(_draw_scene(seed, split, number, arrangement, names))
    return scenes


def _draw_scene(seed: int, split: str, number: int, arrangement: str, names: tuple[str, ...]) -> Scene:
    rng = stream(seed, split, number, "scene")
    seconds = rng.uniform(MIN_CLIP_SECONDS, MAX_CLIP_SECONDS)
    placed: list[PlacedEvent] = []
    earliest = 0.0
    for name in names:
        if arrangement == SEQUENCE:
            onset, length = earliest + rng.uniform(0.03, 0.12), rng.uniform(0.8, 0.95)
            earliest = onset + length
        else:
            onset, length = rng.uniform(0.03, 0.4), rng.uniform(1.3, 1.75)
        gain = rng.uniform(*BALANCE_DB) if placed else 0.0
        placed.append(PlacedEvent(draw_event(name, rng), float(onset), float(length), float(gain)))
    return Scene(
        split=split,
        number=number,
        arrangement=arrangement,
        placed=tuple(placed),
        seconds=float(seconds),
        level_db=float(rng.uniform(*LEVEL_DB)),
        background_db=float(rng.uniform(*BACKGROUND_DB)),
        background_seed=int(rng.integers(2**62)),
    )


def scene_waveform(scene: Scene, sample_rate: int) -> np.ndarray:
    """The clip's samples [S] float64 at `sample_rate` Hz, within +-MAX_PEAK, faded at both ends."""
    noise = np.random.default_rng(scene.background_seed).standard_normal(round(scene.seconds * sample_rate))
    wave = np.zeros(len(noise))
    for placed in scene.placed:
        part = event_waveform(placed.event, placed.seconds, sample_rate) * _gain(placed.gain_db)
        start = round(placed.onset_seconds * sample_rate)
        wave[start : start + len(part)] += part
    wave = wave * _gain(scene.level_db) + noise * _gain(scene.background_db)
    wave *= min(1.0, MAX_PEAK / np.abs(wave).max())
    return fade(wave, FADE_SECONDS, FADE_SECONDS, sample_rate)


def _gain(decibels: float) -> float:
    return float(10 ** (decibels / 20))
