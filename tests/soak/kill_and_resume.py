"""Streams killed at random places and resumed: no example is lost, none comes twice.

    PYTHONPATH=. python tests/soak/kill_and_resume.py --cycles 100 [--ranks 1 2] [--workers 0 2] [--seed 0]

A cycle starts the ranks of a world, each a process that goes through a `TrainStream` and writes each step's examples
and the stream's state into a journal. At a random moment one rank gets SIGKILL, then the others. The next cycle, with
other numbers of ranks and loader processes, goes on from the last step that all ranks have in their journals, as a run
goes on from its last whole checkpoint; what a rank had beyond that is done again. In the end the journals are held
against the order, step by step, and every finished epoch against the list of all examples. Prints a summary as JSON;
exit code 1 on a difference, a hang, or a process that is left.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mellow_ds.config.schema import DataConfig
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.stream import TrainStream
from mellow_ds.world import World
from tests.data.made_shards import RATE, CharTokenizer, make_layout, simple_clips, write_shards

GLOBAL_BATCH = 10
CLIPS = (13, 9, 11, 4)  # by shard; two questions each: 74 examples, 8 steps an epoch, the last of 4
STEP_SECONDS = 0.004  # a step's work: kills shall fall everywhere
MOST_STEPS = 40  # of a cycle, before it is killed
START_SECONDS = 90  # until the first step stands; loader processes import torch, on a busy machine
END_SECONDS = 30  # until every process of a killed world is gone


def open_stream(folder: Path, world: World, workers: int, state: dict[str, Any] | None) -> TrainStream:
    """A rank's stream, from the start or from a state."""
    data = DataConfig(sampling_rate=RATE, segment_seconds=0.02)
    train = TrainConfig(batch_size=3, global_batch_size=GLOBAL_BATCH, num_workers=workers)
    return TrainStream(ShardReader([folder], RATE), CharTokenizer(), make_layout(), data, train, world, state=state)


def run_rank(folder: Path, journal: Path, world: World, workers: int, state: dict[str, Any] | None) -> None:
    """What a rank's process does, until it is killed."""
    with open_stream(folder, world, workers, state) as stream, journal.open("w") as file:
        for step in stream:
            ids = [example for batch in step.micro_batches for example in batch.example_ids]
            file.write(json.dumps({"step": step.step, "ids": ids, "state": step.state}) + "\n")
            file.flush()
            time.sleep(STEP_SECONDS)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a kill may leave a part of one."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Soak:
    """The steps that count so far, and how they came about."""

    folder: Path
    work: Path
    draw: random.Random
    steps: list[list[str]] = field(default_factory=list)  # examples by step, ranks one after the other
    state: dict[str, Any] | None = None
    combinations: Counter[str] = field(default_factory=Counter)
    done_again: int = 0  # steps that some rank had and others not

    def cycle(self, ranks: int, workers: int) -> None:
        """Start a world, kill it, take what all its ranks have."""
        context = multiprocessing.get_context("fork")  # torch is imported already
        journals = [self.work / f"journal-{rank}" for rank in range(ranks)]
        for journal in journals:
            journal.unlink(missing_ok=True)
        processes = [
            context.Process(
                target=run_rank,
                args=(self.folder, journals[rank], World(rank, ranks, rank, ranks), workers, self.state),
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        self._wait_for_a_moment(journals)
        self._kill([process.pid for process in processes if process.pid])
        for process in processes:
            process.join(END_SECONDS)
            assert process.exitcode == -signal.SIGKILL, f"a rank ended with {process.exitcode} before it was killed"
        self._take([read_journal(journal) for journal in journals])
        self.combinations[f"{ranks} ranks, {workers} workers"] += 1

    def _wait_for_a_moment(self, journals: list[Path]) -> None:
        """Until some rank has a random number of steps, or, at times, no step at all."""
        wanted, deadline = self.draw.randrange(MOST_STEPS), time.monotonic() + START_SECONDS
        while wanted and max(len(read_journal(journal)) for journal in journals) < wanted:
            assert time.monotonic() < deadline, "no step in time"
            time.sleep(0.01)
        time.sleep(self.draw.random() * (0.02 if wanted else 1.0))

    def _kill(self, ranks: list[int]) -> None:
        """All ranks, one after the other; then nobody of theirs may be left."""
        family = set(ranks) | {child for rank in ranks for child in _descendants(rank)}
        self.draw.shuffle(ranks)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
            time.sleep(self.draw.random() * 0.03)
        deadline = time.monotonic() + END_SECONDS
        while left := [process for process in family - set(ranks) if _alive(process)]:
            assert time.monotonic() < deadline, f"processes {left} are left of a killed rank"
            time.sleep(0.02)

    def _take(self, journals: list[list[dict[str, Any]]]) -> None:
        """Add the steps that all ranks have."""
        common = min(len(journal) for journal in journals)
        self.done_again += max(len(journal) for journal in journals) - common
        for number in range(common):
            lines = [journal[number] for journal in journals]
            assert {line["step"] for line in lines} == {len(self.steps)}, "a rank went on at another step"
            states = [json.dumps(line["state"], sort_keys=True) for line in lines]
            assert len(set(states)) == 1, "ranks disagree on the state"
            self.steps.append([example for line in lines for example in line["ids"]])
            self.state = lines[0]["state"]


def _descendants(process: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for child in map(int, children):
            found |= {child} | _descendants(child)
    return found


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def check(soak: Soak) -> int:
    """Hold all steps against a stream that nobody killed, and epochs against the examples; how many were whole."""
    reader = ShardReader([soak.folder], RATE)
    every = [q.id for shard in range(len(reader.shards)) for info in reader.infos(shard) for q in info.questions]
    with open_stream(soak.folder, World(), 0, None) as stream:
        per_epoch = stream.steps_per_epoch
        for number, found in enumerate(soak.steps):
            expected = [example for batch in next(stream).micro_batches for example in batch.example_ids]
            assert found == expected, f"step {number} has other examples than without a kill"
    num_epochs = len(soak.steps) // per_epoch
    for epoch in range(num_epochs):
        seen = Counter(ex for step in soak.steps[epoch * per_epoch : (epoch + 1) * per_epoch] for ex in step)
        assert seen == Counter(every), f"epoch {epoch} lost or repeated examples"
    return num_epochs


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        folder = write_shards(Path(name) / "shards", [simple_clips(n, clips) for n, clips in enumerate(CLIPS)])
        soak = Soak(folder, Path(name), random.Random(arguments.seed))
        kinds = [(ranks, workers) for ranks in arguments.ranks for workers in arguments.workers]
        for number in range(arguments.cycles):
            soak.cycle(*kinds[number % len(kinds)])
        num_epochs = check(soak)
    summary = {
        "cycles": arguments.cycles,
        "seed": arguments.seed,
        "steps": len(soak.steps),
        "examples": sum(map(len, soak.steps)),
        "whole_epochs": num_epochs,
        "steps_done_again": soak.done_again,
        **soak.combinations,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
