"""Merging of the ranks' files: complete, once each, whole; else an error and no result."""

import dataclasses
import json
from pathlib import Path

import pytest

from mellow_ds.errors import FaultError
from mellow_ds.evaluation.predictions import (
    PREDICTIONS_NAME,
    Prediction,
    RankPredictions,
    merge_predictions,
    rank_file,
    read_predictions,
    score_prediction,
    write_aside,
)


def _prediction(example_id: str, text: str = "yes") -> Prediction:
    return score_prediction(example_id, "s", ("k1", "k2"), "is it?", "yes", text)


def _write(folder: Path, rank: int, *ids: str) -> None:
    with RankPredictions(folder, rank) as file:
        for example_id in ids:
            file.write(_prediction(example_id))


def test_merged_sorted_and_written(tmp_path: Path) -> None:
    _write(tmp_path, 0, "d", "b")
    _write(tmp_path, 1, "c", "a")
    _write(tmp_path, 2)
    merged = merge_predictions(tmp_path, 3, 4)
    assert [p.id for p in merged] == ["a", "b", "c", "d"]
    assert read_predictions(tmp_path / PREDICTIONS_NAME) == merged
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS_NAME]
    first = json.loads((tmp_path / PREDICTIONS_NAME).read_text().splitlines()[0])
    assert first == {**dataclasses.asdict(_prediction("a")), "clips": ["k1", "k2"]}


def test_texts_that_break_lines_elsewhere(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\nfour \u00e9"
    with RankPredictions(tmp_path, 0) as file:
        file.write(_prediction("a", text))
    assert merge_predictions(tmp_path, 1, 1)[0].prediction == text
    assert read_predictions(tmp_path / PREDICTIONS_NAME)[0].prediction == text


def test_files_of_an_earlier_larger_world_do_not_count(tmp_path: Path) -> None:
    _write(tmp_path, 5, "old")
    _write(tmp_path, 0, "a")
    assert [p.id for p in merge_predictions(tmp_path, 1, 1)] == ["a"]
    assert not rank_file(tmp_path, 5).exists()


@pytest.mark.parametrize(
    ("ids", "expected", "message"),
    [
        ((("a", "b"), ("c",)), 4, "3 examples were evaluated on 2 ranks, but there are 4"),
        ((("a", "b"), ("c",)), 2, "but there are 2"),
        ((("a", "b"), ("b",)), 3, "1 examples were evaluated more than once (b"),
    ],
)
def test_wrong_sets_are_refused(tmp_path: Path, ids: tuple[tuple[str, ...], ...], expected: int, message: str) -> None:
    for rank, own in enumerate(ids):
        _write(tmp_path, rank, *own)
    with pytest.raises(FaultError) as caught:
        merge_predictions(tmp_path, len(ids), expected)
    assert message in str(caught.value)
    assert not (tmp_path / PREDICTIONS_NAME).exists()


def test_missing_rank_file_says_that_the_folder_must_be_shared(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a")
    with pytest.raises(FaultError, match="rank 1 wrote to another file system"):
        merge_predictions(tmp_path, 2, 2)


def test_cut_rank_file_is_seen_wherever_it_is_cut(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a", "b")
    whole = rank_file(tmp_path, 0).read_bytes()
    # without the last newline the content is still whole
    for end in range(len(whole) - 1):
        rank_file(tmp_path, 0).write_bytes(whole[:end])
        with pytest.raises(FaultError, match="was cut"):
            merge_predictions(tmp_path, 1, 2)


def test_a_rank_that_fails_leaves_no_complete_file(tmp_path: Path) -> None:
    def fail(file: RankPredictions) -> None:
        file.write(_prediction("a"))
        raise KeyError

    with pytest.raises(KeyError), RankPredictions(tmp_path, 0) as file:
        fail(file)
    with pytest.raises(FaultError, match="was cut"):
        merge_predictions(tmp_path, 1, 1)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_aside(path, ["old"])

    def chunks():
        yield "new"
        raise OSError(28, "No space left on device")

    with pytest.raises(FaultError, match="No space left"):
        write_aside(path, chunks())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
