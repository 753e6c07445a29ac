"""The first pass: the same bytes are one clip, every fault has its path, changes are seen."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.survey import Listing, Survey, content_key, list_sources, survey_sources


def look_at(root: Path, paths: list[str], workers: int = 1) -> tuple[Survey, dict[str, int | str]]:
    """(the survey, the clip of each path, or its fault)."""
    with Catalogue(None) as catalogue:
        numbers = {path: catalogue.number_of(path) for path in paths}
        survey = survey_sources(root, catalogue, None, workers, tqdm(disable=True))
        found: dict[str, int | str] = {path: int(survey.clip_of[number]) for path, number in numbers.items()}
        for path, number in numbers.items():
            fault = catalogue.fault_of(number)
            if fault is not None:
                assert found[path] == -1
                found[path] = fault.reason
        for clip, number in enumerate(survey.sources):
            found[f"source of {clip}"] = catalogue.path_of(number)
    return survey, found


def listing(root: Path, paths: list[str], workers: int = 1) -> tuple[Listing, dict[str, int]]:
    with Catalogue(None) as catalogue:
        numbers = {path: catalogue.number_of(path) for path in paths}
        found = list_sources(root, catalogue, workers)
        return found, {path: int(found.file_bytes[number]) for path, number in numbers.items()}


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_bytes_under_two_names_are_one_clip(corpus: Any, workers: int) -> None:
    first = corpus.tone("b/first.wav")
    shutil.copy(first, corpus.root / "another.wav")
    second = corpus.tone("second.wav", hertz=300, seconds=0.1)
    survey, found = look_at(corpus.root, ["second.wav", "b/first.wav", "another.wav"], workers)
    keys = [content_key(path.read_bytes()) for path in (first, second)]
    clip = sorted(keys).index(keys[0])
    assert [survey.key(number) for number in range(survey.num_clips)] == sorted(keys)
    assert (found["b/first.wav"], found["another.wav"], found["second.wav"]) == (clip, clip, 1 - clip)
    assert found[f"source of {clip}"] == "another.wav", "the first path in alphabetical order stands for the clip"
    assert (survey.header(clip).sample_rate, survey.header(clip).num_frames) == (8_000, 400)
    assert survey.header(1 - clip).frames_at(32_000) == 3_200
    names = ["b/first.wav", "second.wav", "another.wav"]
    lines = sorted(f"{key} {path}" for key, path in zip([*keys, keys[0]], names, strict=True))
    assert survey.content_hash == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    asked = np.array([keys[1].encode(), keys[0].encode(), keys[1].encode()])
    assert survey.clips_of_keys(asked).tolist() == [1 - clip, clip, 1 - clip]


def test_faults_stand_with_their_paths(corpus: Any) -> None:
    good = corpus.tone("good.wav")
    (corpus.root / "text.wav").write_text("no audio")
    survey, found = look_at(corpus.root, ["good.wav", "text.wav", "gone.wav"], 2)
    assert {path: found[path] for path in ("good.wav", "gone.wav", "text.wav")} == {
        "good.wav": 0,
        "gone.wav": "file is missing",
        "text.wav": "cannot be decoded",
    }
    lines = f"{content_key(good.read_bytes())} good.wav\n- gone.wav\n- text.wav"
    assert survey.content_hash == hashlib.sha256(lines.encode()).hexdigest()


def test_what_is_not_wanted_is_not_looked_at(corpus: Any) -> None:
    corpus.tone("a.wav")
    with Catalogue(None) as catalogue:
        for path in ("a.wav", "gone.wav"):
            catalogue.number_of(path)
        survey = survey_sources(corpus.root, catalogue, np.array([True, False]), 1, tqdm(disable=True))
        assert (survey.clip_of.tolist(), catalogue.fault_of(1)) == ([0, -1], None)


def test_hashes_follow_the_content(corpus: Any) -> None:
    paths = ["a.wav", "b.wav"]
    for path in paths:
        corpus.tone(path)
    before, sizes = listing(corpus.root, paths)
    content = look_at(corpus.root, paths)[0].content_hash
    assert listing(corpus.root, paths[::-1], 4)[0].sha256 == before.sha256
    assert sizes == {path: (corpus.root / path).stat().st_size for path in paths}
    lines = "\n".join(f"{sizes[path]} {path}" for path in paths)
    assert before.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    changed = corpus.tone("b.wav", hertz=300)  # of the same size
    os.utime(changed, (0, 0))
    after, _ = listing(corpus.root, paths)
    assert after.sha256 == before.sha256
    assert after.newest_change > before.newest_change, "the change time is seen where the write time is made old"
    assert look_at(corpus.root, paths)[0].content_hash != content
    corpus.tone("b.wav", seconds=0.06)
    assert listing(corpus.root, paths)[0].sha256 != before.sha256
    assert listing(corpus.root, ["a.wav", "gone.wav"])[1]["gone.wav"] == 0
