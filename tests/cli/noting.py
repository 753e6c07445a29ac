"""train.py that also notes what it trains on: the example ids of every step, a file a rank in the folder of `--notes=`.

With `--gate=STEP:FILE` it waits at a step until the file is there, so that a test can do things in the middle of a run.
Nothing else of the run is changed: the notes are taken where the trainer fetches a step.
"""

import json
import os
import sys
import time
from pathlib import Path

from mellow_ds.cli.train import main as train

OWN = ("--notes", "--gate")


def main(arguments: list[str]) -> int:
    """Train and take notes; returns the exit code."""
    own = {name: value for name, _, value in (argument.partition("=") for argument in arguments) if name in OWN}
    take_notes(Path(own["--notes"]), own.get("--gate", ""))
    return train([argument for argument in arguments if argument.partition("=")[0] not in own])


def take_notes(folder: Path, gate: str = "") -> None:
    """Let every stream of this process write down the steps that it hands out, and wait at the gate."""
    from mellow_ds.data.stream import StepBatches, TrainStream

    folder.mkdir(parents=True, exist_ok=True)
    path = notes_of(folder, int(os.environ.get("RANK", "0")))
    honest = TrainStream.__next__
    gate_step, _, gate_file = gate.partition(":")

    def noting(stream: TrainStream) -> StepBatches:
        step = honest(stream)
        while gate and step.step + 1 == int(gate_step) and not Path(gate_file).exists():
            time.sleep(0.1)
        ids = [example for batch in step.micro_batches for example in batch.example_ids]
        with path.open("a", buffering=1) as file:
            file.write(json.dumps({"step": step.step + 1, "ids": ids}) + "\n")  # from 1, as checkpoints count
        return step

    TrainStream.__next__ = noting  # type: ignore[method-assign]


def notes_of(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank}.jsonl"


def read_notes(folder: Path, rank: int) -> list[tuple[int, list[str]]]:
    """(step, example ids) in the order of fetching; a kill may leave a part of a line."""
    path = notes_of(folder, rank)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(note["step"]), list(note["ids"])) for note in map(json.loads, lines)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
