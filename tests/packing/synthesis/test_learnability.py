"""The kinds of events can be told apart from the samples by very little, and not at all from the text."""

import itertools
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mellow_ds.packing.synthesis.events import NAMES
from mellow_ds.packing.synthesis.questions import make_records
from mellow_ds.packing.synthesis.scenes import ALONE, SEQUENCE, Scene, draw_scenes, scene_waveform

RATE, FRAME, HOP, BANDS, SPANS = 16_000, 512, 256, 20, 4


def spectrogram(wave: np.ndarray) -> np.ndarray:
    """[frames, BANDS] log power in bands that widen with frequency."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(3, FRAME // 2 + 1, BANDS + 1).round().astype(int))
    return np.log(np.stack([power[:, a:b].mean(1) for a, b in itertools.pairwise(edges)], 1) + 1e-4)


def features(wave: np.ndarray) -> np.ndarray:
    """What a listener might note: the spectrum in each quarter of the sounding part, and how it varies."""
    log_power = spectrogram(wave)
    loud = np.flatnonzero(log_power.max(1) > log_power.max() - 7)
    sounding = log_power[loud[0] : loud[-1] + 1]
    quarters = [part.mean(0) for part in np.array_split(sounding, SPANS)]
    return np.concatenate([*quarters, sounding.std(0), np.abs(np.diff(sounding, axis=0)).mean(0)])


def ridge(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    """Class scores [N, 12] of a linear classifier fitted in closed form."""
    mean, scale = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    train_x, test_x = (np.hstack([x, np.ones((len(x), 1))]) for x in (train_x, test_x))
    targets = np.eye(len(NAMES))[train_y]
    weights = np.linalg.solve(train_x.T @ train_x + 10 * np.eye(train_x.shape[1]), train_x.T @ targets)
    return test_x @ weights


def alone(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """(features, number of the kind) of the clips with one event."""
    chosen = [scene for scene in scenes if scene.arrangement == ALONE]
    kinds = np.array([NAMES.index(scene.names[0]) for scene in chosen])
    return np.stack([features(scene_waveform(scene, RATE)) for scene in chosen]), kinds


def test_a_linear_classifier_hears_the_kinds_and_the_order_on_held_out_draws():
    train_x, train_y = alone(draw_scenes(1, "train", 384))
    test_scenes = draw_scenes(1, "test", 120)
    test_x, test_y = alone(test_scenes)
    accuracy = (ridge(train_x, train_y, test_x).argmax(1) == test_y).mean()
    assert accuracy > 0.9  # chance is 1/12

    # the same classifier on the two halves of a sequence finds which event comes first
    sequences = [scene for scene in test_scenes if scene.arrangement == SEQUENCE]
    right = []
    for scene in sequences:
        wave = scene_waveform(scene, RATE)
        middle = round((scene.placed[1].onset_seconds - 0.01) * RATE)
        scores = ridge(train_x, train_y, np.stack([features(wave[:middle]), features(wave[middle:])]))
        first, second = (NAMES.index(name) for name in scene.names)
        right.append(scores[0, first] + scores[1, second] > scores[0, second] + scores[1, first])
    assert np.mean(right) > 0.8  # chance is 1/2


@pytest.fixture(scope="module")
def train_and_test_records():
    return [make_records(draw_scenes(1, split, 600), 1, "wav") for split in ("train", "test")]


def test_someone_who_only_reads_stays_at_chance(train_and_test_records):
    """The most frequent answer to the very same text, learned on train; for a new text that of its family."""
    train, test = train_and_test_records
    answers = defaultdict(Counter)
    for record in train:
        answers[record["subtype"], record["input"]][record["answer"]] += 1
        answers[record["subtype"], ""][record["answer"]] += 1
    right, asked = Counter(), Counter()
    for record in test:
        known = answers.get((record["subtype"], record["input"])) or answers[record["subtype"], ""]
        right[record["subtype"]] += known.most_common(1)[0][0] == record["answer"]
        asked[record["subtype"]] += 1
    chance = {"event-open": 1 / 12, "event-binary": 1 / 2, "count-open": 1 / 2, "same-binary": 1 / 2}
    chance |= {"entailment": 1 / 2, "event-mcq": 1 / 4, "order-mcq": 1 / 4, "caption": 1 / 24, "difference": 1 / 24}
    for subtype, level in chance.items():
        spread = (level * (1 - level) / asked[subtype]) ** 0.5
        assert right[subtype] / asked[subtype] < level + 4 * spread, subtype


def test_the_letter_of_an_option_cannot_be_read_from_its_text(train_and_test_records):
    """A reader who knows how often each name was right, and how often each letter, picks no better than a guess."""
    train, test = ([r for r in split if r["subtype"] == "event-mcq"] for split in train_and_test_records)
    name_right = Counter(record["answer"][3:] for record in train)
    letter_right = Counter(record["answer"][0] for record in train)
    num_right = 0
    for record in test:
        parts = re.split(r" ([a-d])\) ", record["input"])[1:]
        offered = dict(zip(parts[::2], parts[1::2], strict=True))
        best = max(offered, key=lambda letter: name_right[offered[letter]] * letter_right[letter])
        num_right += record["answer"] == f"{best}) {offered[best]}"
    assert num_right / len(test) < 0.25 + 4 * (0.1875 / len(test)) ** 0.5
