"""Scenes are balanced, repeatable and stay inside their clip; their samples show what they say."""

from collections import Counter

import numpy as np
import pytest

from mellow_ds.packing.synthesis.events import NAMES
from mellow_ds.packing.synthesis.scenes import (
    ALONE,
    BACKGROUND_DB,
    MAX_CLIP_SECONDS,
    MAX_PEAK,
    SEQUENCE,
    TOGETHER,
    draw_scenes,
    scene_waveform,
)

RATE = 16_000


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(5, "train", 480)


def test_arrangements_and_names_are_balanced(scenes):
    assert Counter(scene.arrangement for scene in scenes) == {ALONE: 240, SEQUENCE: 120, TOGETHER: 120}
    assert set(Counter(scene.names[0] for scene in scenes if scene.arrangement == ALONE).values()) == {20}
    for arrangement in (SEQUENCE, TOGETHER):
        pairs = [scene.names for scene in scenes if scene.arrangement == arrangement]
        assert all(first != second for first, second in pairs)
        assert max(Counter(pairs).values()) <= 2
        assert {name for pair in pairs for name in pair} == set(NAMES)


def test_a_longer_list_begins_with_the_shorter_one(scenes):
    assert draw_scenes(5, "train", 37) == scenes[:37]


def test_splits_and_seeds_have_their_own_draws(scenes):
    pitches = {p.event.pitch_hz for scene in scenes for p in scene.placed if p.event.pitch_hz != 1.0}
    for other in (draw_scenes(5, "val", 100), draw_scenes(6, "train", 100)):
        assert not pitches & {p.event.pitch_hz for scene in other for p in scene.placed if p.event.pitch_hz != 1.0}
        assert [s.names for s in other] != [s.names for s in scenes[:100]]


def test_events_stand_inside_their_clip_in_order_or_overlapping(scenes):
    for scene in scenes:
        ends = [placed.onset_seconds + placed.seconds for placed in scene.placed]
        assert max(ends) < scene.seconds <= MAX_CLIP_SECONDS
        if scene.arrangement == SEQUENCE:
            assert ends[0] < scene.placed[1].onset_seconds
        if scene.arrangement == TOGETHER:
            shared = min(ends) - max(placed.onset_seconds for placed in scene.placed)
            assert shared > 0.6 * max(placed.seconds for placed in scene.placed) - 0.2


def test_waveforms_have_their_length_stay_below_full_scale_and_fade(scenes):
    for scene in scenes[:60]:
        wave = scene_waveform(scene, RATE)
        assert wave.shape == (round(scene.seconds * RATE),)
        assert np.isfinite(wave).all()
        assert 0.08 < np.abs(wave).max() <= MAX_PEAK
        assert np.abs(wave[[0, -1]]).max() < 1e-9


def test_the_gap_of_a_sequence_holds_only_the_background(scenes):
    for scene in [s for s in scenes if s.arrangement == SEQUENCE][:30]:
        wave = scene_waveform(scene, RATE)
        first, second = scene.placed
        gap = wave[round((first.onset_seconds + first.seconds) * RATE) + 1 : round(second.onset_seconds * RATE) - 1]
        assert np.sqrt((gap**2).mean()) < 1.3 * 10 ** (BACKGROUND_DB[1] / 20)
        for placed in scene.placed:
            start = round(placed.onset_seconds * RATE)
            assert np.sqrt((wave[start : start + round(placed.seconds * RATE)] ** 2).mean()) > 0.01


def test_captions_say_what_was_drawn(scenes):
    for scene in scenes:
        if scene.arrangement == ALONE:
            assert scene.caption == scene.placed[0].event.name
        elif scene.arrangement == SEQUENCE:
            early, late = sorted(scene.placed, key=lambda placed: placed.onset_seconds)
            assert scene.caption == f"{early.event.name} followed by {late.event.name}"
        else:
            assert scene.caption == f"{scene.names[0]} and {scene.names[1]} at the same time"
