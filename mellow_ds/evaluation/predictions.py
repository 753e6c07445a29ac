"""Predictions on disk: each rank writes its own file, rank 0 merges them into `predictions.jsonl` and counts them.

Nothing is gathered by pickle, and nothing is kept in memory on ranks above 0. All ranks must see the folder.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mellow_ds.errors import FaultError
from mellow_ds.evaluation.answers import Kind, score_example

PREDICTIONS_NAME = "predictions.jsonl"
_MOST_NAMED = 3  # ids named in a message


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl: an example, what was generated for it, and its score."""

    id: str  # of the example: content hash of its question
    subtype: str
    clips: tuple[str, ...]  # keys, in the order of the sequence
    question: str  # as rendered for the model
    answer: str  # the reference that it is scored against
    prediction: str
    kind: Kind
    correct: bool
    readable: bool
    finished: bool = True  # ended by end-of-text, not by max_new_tokens


def score_prediction(
    example_id: str,
    subtype: str,
    clips: tuple[str, ...],
    question: str,
    answer: str,
    prediction: str,
    finished: bool = True,
) -> Prediction:
    """The scored prediction of an example."""
    score = score_example(question, answer, prediction)
    return Prediction(
        example_id,
        subtype,
        clips,
        question,
        answer,
        prediction,
        score.kind,
        score.correct,
        score.readable,
        finished,
    )


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its predictions until rank 0 has merged them."""
    return folder / f"predictions-rank{rank:05d}.jsonl"


class RankPredictions:
    """Writes one rank's predictions, a line each, and a last line that says how many: a file without it is cut."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = rank_file(folder, rank)
        self._num_written = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise FaultError(f"{self._path} cannot be written ({error.strerror})") from None

    def write(self, prediction: Prediction) -> None:
        """Append one prediction."""
        self._write_line(dataclasses.asdict(prediction))
        self._num_written += 1

    def _write_line(self, content: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(content, ensure_ascii=False) + "\n")
        except OSError as error:
            raise FaultError(f"{self._path} cannot be written ({error.strerror})") from None

    def __enter__(self) -> "RankPredictions":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_line({"num_predictions": self._num_written})
        try:
            self._file.close()
        except OSError as close_error:
            raise FaultError(f"{self._path} cannot be written ({close_error.strerror})") from None


def merge_predictions(folder: Path, world_size: int, num_expected: int) -> list[Prediction]:
    """All ranks' predictions, sorted by id, also written to `predictions.jsonl`; the ranks' files are removed.

    Raises `FaultError` where a rank's file is missing or cut, an example occurs twice, or their number is not
    `num_expected`: a score over other examples than those asked for is not reported.
    """
    predictions = [p for rank in range(world_size) for p in _read_rank(folder, rank)]
    predictions.sort(key=lambda p: p.id)
    twice = [a.id for a, b in itertools.pairwise(predictions) if a.id == b.id]
    if twice:
        raise FaultError(
            f"{len(twice)} examples were evaluated more than once ({', '.join(twice[:_MOST_NAMED])}): does a question "
            f"stand in two of the evaluation shards? No result is written; the ranks' files stay in {folder}"
        )
    if len(predictions) != num_expected:
        raise FaultError(
            f"{len(predictions)} examples were evaluated on {world_size} ranks, but there are {num_expected}: "
            f"no result is written; the ranks' files stay in {folder}"
        )
    write_aside(
        folder / PREDICTIONS_NAME,
        (json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in predictions),
    )
    for path in folder.glob("predictions-rank*.jsonl"):
        path.unlink()
    return predictions


def _read_rank(folder: Path, rank: int) -> list[Prediction]:
    path = rank_file(folder, rank)
    try:
        # not splitlines(): a text may hold U+2028, which JSON leaves as it is
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FaultError(
            f"{path} is not there: rank {rank} wrote to another file system; name a folder that all hosts share"
        ) from None
    try:
        records = [json.loads(line) for line in lines if line]
        num_written = records.pop()["num_predictions"]
    except (ValueError, IndexError, KeyError):
        records, num_written = [], -1
    if num_written != len(records):
        raise FaultError(f"{path} was cut: rank {rank} did not finish writing (is the disk full?); evaluate again")
    return [_from_record(record) for record in records]


def _from_record(record: dict[str, Any]) -> Prediction:
    return Prediction(**{**record, "clips": tuple(record["clips"])})


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions in a `predictions.jsonl`."""
    return [_from_record(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_aside(path: Path, chunks: Iterable[str]) -> None:
    """Write a text file so that under its name there is the old one or the whole new one, never a part."""
    aside = path.with_name(f".{path.name}.new")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise FaultError(f"{path} cannot be written ({error.strerror}); nothing under that name was changed") from None
