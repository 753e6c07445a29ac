"""The first pass: the same bytes are one clip, every fault has its path, changes are seen."""

import os
import shutil
from typing import Any

import pytest
from tqdm import tqdm

from mellow_ds.packing.survey import content_key, list_sources, survey_sources


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_bytes_under_two_names_are_one_clip(corpus: Any, workers: int) -> None:
    first = corpus.tone("b/first.wav")
    shutil.copy(first, corpus.root / "another.wav")
    corpus.tone("second.wav", hertz=300, seconds=0.1)
    survey = survey_sources(
        corpus.root, ["second.wav", "b/first.wav", "another.wav"], workers, tqdm(total=3, disable=True)
    )
    key = content_key(first.read_bytes())
    assert survey.key_of["b/first.wav"] == survey.key_of["another.wav"] == key
    assert len(survey.clips) == 2
    assert survey.clips[key].source == "another.wav", "the first path in alphabetical order stands for the clip"
    assert (survey.clips[key].header.sample_rate, survey.clips[key].header.num_frames) == (8_000, 400)
    assert survey.clips[survey.key_of["second.wav"]].header.frames_at(32_000) == 3_200


def test_faults_stand_with_their_paths(corpus: Any) -> None:
    corpus.tone("good.wav")
    (corpus.root / "text.wav").write_text("no audio")
    survey = survey_sources(corpus.root, ["good.wav", "text.wav", "gone.wav"], 2, tqdm(disable=True))
    assert {path: fault.reason for path, fault in survey.bad.items()} == {
        "gone.wav": "file is missing",
        "text.wav": "cannot be decoded",
    }


def test_hashes_follow_the_content(corpus: Any) -> None:
    paths = ["a.wav", "b.wav"]
    for path in paths:
        corpus.tone(path)
    bar = tqdm(disable=True)
    before = list_sources(corpus.root, paths, 1)
    content = survey_sources(corpus.root, paths, 1, bar).content_hash
    assert list_sources(corpus.root, paths[::-1], 4) == before
    assert before.file_bytes == {path: (corpus.root / path).stat().st_size for path in paths}
    changed = corpus.tone("b.wav", hertz=300)  # of the same size
    os.utime(changed, (0, 0))
    after = list_sources(corpus.root, paths, 1)
    assert after.sha256 == before.sha256
    assert after.newest_change > before.newest_change, "the change time is seen where the write time is made old"
    assert survey_sources(corpus.root, paths, 1, bar).content_hash != content
    corpus.tone("b.wav", seconds=0.06)
    assert list_sources(corpus.root, paths, 1).sha256 != before.sha256
    assert list_sources(corpus.root, ["a.wav", "gone.wav"], 1).file_bytes["gone.wav"] == 0
