"""Whole runs killed at swept moments of a save and started again by the same command: nothing that was saved is lost.

    PYTHONPATH=. python tests/soak/kill_runs.py --kills 24 [--by deepspeed torchrun] [--engines zero2 fsdp2] [--seed 0]

Each engine has a run of its own, two ranks on a tiny model that save at every step. A cycle starts it by a launcher (in
turn), in the background or waiting for saves, and waits until a save is on its way; a swept moment later one rank gets
SIGKILL, or both. All that was started must end in time, with a code that is not 0. Then no published step may be
damaged or older than one that the run knew of, and the next start of the same command must take the newest complete
one. Two cycles of five make a run go through a step again that is saved already: its newest step is damaged when it
starts, and stays so (the save replaces it) or is put right as soon as it is passed over (the save finds it whole). In
the end each run is let through, and must have the losses, bit for bit, and the example ids of a run that nobody killed.
Prints a summary as JSON; exit code 1 on a difference, a hang, or a process that is left.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.checkpoint.retention import published_steps
from mellow_ds.checkpoint.step_folder import step_of
from mellow_ds.errors import CheckpointError
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.noting import read_notes
from tests.cli.runs import ROOT, TINY, by_deepspeed, by_torchrun, environment, started

RANKS = 2
ENGINES = {
    "zero2": ["--engine", "deepspeed", "--deepspeed_config", "ds_configs/zero2.json"],
    "fsdp2": ["--engine", "fsdp", "--deepspeed_config", "ds_configs/zero3.json"],
}
SWEPT_SECONDS = 0.12  # after a save has begun; as long as one takes here, and the steps after it
START_SECONDS = 200
END_SECONDS = 30  # until all of a start is over
SAVES_BEFORE = 3  # whole saves of a start before the one that is cut, at most


@dataclass
class Start:
    """A command at work."""

    pids: Callable[[], list[int]]  # of the ranks, in order; short while they are being started
    is_alive: Callable[[], bool]
    end: Callable[[float], int]  # wait for all of it so many seconds; the exit code
    said: Callable[[], str]


@contextlib.contextmanager
def launched_start(launcher: Callable[..., list[str]], arguments: Sequence[object], work: Path) -> Iterator[Start]:
    """By the launcher's own command, with all its processes."""
    command = launcher(*arguments)
    command[command.index("train.py")] = "tests/cli/noting.py"
    said = work / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)

    def family() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if any(str(work) in a for a in p.info["cmdline"] or ())]

    def pids() -> list[int]:
        found = {}
        for own in family():
            with contextlib.suppress(psutil.Error):
                rank = own.environ().get("RANK")
                if rank is not None and "tests/cli/noting.py" in own.cmdline():
                    found[int(rank)] = own.pid
        return [found[rank] for rank in sorted(found)]

    def end(seconds: float) -> int:
        deadline = time.monotonic() + seconds
        code = process.wait(seconds)
        while left := [p for p in family() if p.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < deadline, f"processes {left} are left of a killed run"
            time.sleep(0.1)
        return code

    try:
        yield Start(pids, lambda: process.poll() is None, end, said.read_text)
    finally:
        for left in [process, *family()]:
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


@contextlib.contextmanager
def forked_start(arguments: Sequence[object], _work: Path) -> Iterator[Start]:
    """As bare processes, of which nobody ends the other, that have imported their libraries already."""
    with started("noting.py", *arguments, num_ranks=RANKS) as ranks:

        def end(seconds: float) -> int:
            done = [rank.end(time.monotonic() + seconds) for rank in ranks]
            return next((one.returncode for one in done if one.returncode), 0)

        alive = [psutil.Process(rank.pid) for rank in ranks]
        yield Start(
            lambda: [rank.pid for rank in ranks],
            lambda: all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in alive),
            end,
            lambda: "\n".join(rank.said() for rank in ranks),
        )


WAYS: dict[str, Callable[[Sequence[object], Path], contextlib.AbstractContextManager[Start]]] = {
    "deepspeed": lambda arguments, work: launched_start(by_deepspeed, arguments, work),
    "torchrun": lambda arguments, work: launched_start(by_torchrun, arguments, work),
    "forked": forked_start,
}


@dataclass
class KilledRun:
    """A run of one engine, over all its starts."""

    engine: str
    shards: Path
    work: Path
    max_steps: int
    draw: random.Random
    offset: int = 0  # where the sweep begins
    num_starts: int = 0
    met: Counter[str] = field(default_factory=Counter)
    taken_again: int = 0  # steps that were fetched by more than one start
    spoilt: set[int] = field(default_factory=set)  # steps damaged by us; where a newer one is taken, they stay so
    put_right: set[int] = field(default_factory=set)  # steps passed over by one start and there again for the next

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.work / "run"

    @property
    def checkpoints(self) -> Path:
        """Its step folders."""
        return self.folder / "checkpoints"

    def arguments(self, is_async: bool) -> list[object]:
        """The command's, but for the notes the same each time."""
        return [
            "--config", "quickstart", "--data.shards", self.shards, "--save-dir", self.folder, *TINY,
            *ENGINES[self.engine], "--train.max_steps", self.max_steps, "--train.save_every_steps", 1,
            "--train.keep_checkpoints", 3, "--train.async_save", str(is_async).lower(),
            f"--notes={self.work / 'notes' / str(self.num_starts)}",
        ]  # fmt: skip

    def cycle(self, way: str) -> None:
        """Start, kill in a save, look at what is left."""
        number = self.offset + self.num_starts
        again = ("", "damaged", "", "", "damaged for a moment")[number % 5]
        again = again if len(published_steps(self.checkpoints)) > 1 else ""  # else nothing is left to go on from
        undo = damage_newest(self.checkpoints) if again else None
        if again:
            spoilt = self.put_right if again == "damaged for a moment" else self.spoilt
            spoilt.add(step_of(published_steps(self.checkpoints)[-1]) or 0)
        expected = self.newest_whole()
        is_async = number % 4 < 2
        with WAYS[way](self.arguments(is_async), self.work) as start:
            begun = self.wait_for_save(start, undo if again == "damaged for a moment" else None)
            time.sleep(SWEPT_SECONDS * ((number * 0.618) % 1.0))  # the golden section: any number of kills is spread
            pids = start.pids()
            killed = (pids[:1], pids[1:], pids)[number % 3]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            code = start.end(END_SECONDS)
            said = start.said()
        assert code != 0, f"{way} ended with 0 though a rank was killed\n{said[-3000:]}"
        self.check(expected, begun, said)
        self.met[what_is_left(self.checkpoints)] += 1
        self.met["of one rank" if len(killed) == 1 else "of both"] += 1
        self.met["in the background" if is_async else "waited for"] += 1
        self.met["of a step again"] += bool(again)
        self.met[way] += 1
        self.num_starts += 1

    def wait_for_save(self, start: Start, undo: Callable[[], None] | None) -> int:
        """Until this start has made some saves and is in one; the step that it began with."""
        notes = self.work / "notes" / str(self.num_starts)
        deadline = time.monotonic() + START_SECONDS
        wanted = 1 + self.draw.randrange(SAVES_BEFORE + 1)
        if not self.num_starts and self.offset % 4 < 3:  # else the very first save is cut
            wanted = 4  # so that two are published
        while True:
            assert start.is_alive(), f"it ended by itself\n{start.said()[-3000:]}"
            assert time.monotonic() < deadline, f"no save in time\n{start.said()[-3000:]}"
            fetched = read_notes(notes, 0)
            if fetched and undo is not None:
                undo()
                undo = None
            if len(fetched) >= wanted and len(start.pids()) == RANKS:
                break
            time.sleep(0.005)
        while not list(self.checkpoints.glob(".writing-*")):
            assert start.is_alive(), f"it ended by itself\n{start.said()[-3000:]}"
            assert time.monotonic() < deadline, f"no save in time\n{start.said()[-3000:]}"
        return fetched[0][0]

    def newest_whole(self) -> set[int]:
        """Steps that a start may rightly go on from: the newest that is whole, or one that is written and not named."""
        whole = [step for path in published_steps(self.checkpoints) if (step := step_of(path)) and is_whole(path)]
        newest = max(whole, default=0)
        aside = {
            int(path.name.rpartition("-")[2]) for path in self.checkpoints.glob(".writing-*")
            if (path / "files.json").exists() or len(list(path.glob("part-*.json"))) == RANKS
        }  # fmt: skip
        return {newest} | {step for step in aside if step > newest}

    def check(self, expected: set[int], begun: int, said: str) -> None:
        """What a killed start leaves, and that it went on from where it had to."""
        assert begun - 1 in expected, f"it went on from step {begun - 1}, not one of {expected}\n{said[-3000:]}"
        promised = [r["step"] for r in read_metrics(self.folder / "metrics.jsonl") if r.get("name") == "save"]
        newest = max(self.newest_whole())
        assert newest >= max([begun - 1, *promised]), f"of steps {promised} known as saved, {newest} is the newest"
        for path in published_steps(self.checkpoints):
            assert is_whole(path) or step_of(path) in self.spoilt, f"{path.name} is damaged"

    def finish(self, way: str) -> None:
        """Let it through."""
        expected = self.newest_whole()
        with WAYS[way](self.arguments(True), self.work) as start:
            code = start.end(START_SECONDS)
            assert code == 0, start.said()[-3000:]
        begun = read_notes(self.work / "notes" / str(self.num_starts), 0)[0][0]
        assert begun - 1 in expected, f"it went on from step {begun - 1}, not one of {expected}"
        self.num_starts += 1

    def compare(self, straight: "KilledRun") -> None:
        """With a run of the same engine that nobody killed."""
        ours, theirs = self.losses(), straight.losses()
        assert len(theirs) == self.max_steps
        assert ours.items() <= theirs.items(), "the losses are not those of the run that nobody killed"
        # a start that passes a step over drops its record too; killed soon after, it has not made it again
        assert theirs.keys() - ours.keys() <= self.put_right, f"records of {theirs.keys() - ours.keys()} are missing"
        for rank in range(RANKS):
            wanted = dict(read_notes(straight.work / "notes" / "0", rank))
            fetched: Counter[int] = Counter()
            for number in range(self.num_starts):
                for step, ids in read_notes(self.work / "notes" / str(number), rank):
                    assert ids == wanted[step], f"step {step} of start {number} has other examples on rank {rank}"
                    fetched[step] += 1
            assert sorted(fetched) == list(range(1, self.max_steps + 1)), "a step was never fetched"
            self.taken_again += sum(count - 1 for count in fetched.values()) * (rank == 0)

    def losses(self) -> dict[int, float]:
        """By step."""
        records = [r for r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "step"]
        steps = [r["step"] for r in records]
        assert steps == sorted(set(steps)), "a step stands twice"
        return {r["step"]: r["loss"] for r in records}


def is_whole(path: Path) -> bool:
    """Whether all its files are what was written."""
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def damage_newest(checkpoints: Path) -> Callable[[], None]:
    """Flip a bit of the newest step; what puts it right again."""
    path = sorted(published_steps(checkpoints)[-1].glob("model*.safetensors"))[0]

    def flip() -> None:
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:  # replaced or removed meanwhile
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    flip()
    return flip


def what_is_left(checkpoints: Path) -> str:
    """At which moment of a save it was."""
    aside = list(checkpoints.glob(".writing-*"))
    if not aside:
        return "published"
    names = {path.name for path in aside[0].iterdir()}
    if "files.json" in names:
        return "being published"
    parts = sum(name.startswith("part-") for name in names)
    return "written" if parts == RANKS else "half written" if names else "begun"


def soak(kills: int, ways: Sequence[str], engines: Sequence[str], seed: int, work: Path) -> dict[str, object]:
    """All kills; what they met."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    began = time.monotonic()
    synthesize(work / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
    build_shards([work / "corpus" / "train.json"], work / "corpus", work / "shards")
    most = (SAVES_BEFORE + 4) * -(-kills // len(engines)) + 60  # more steps than the kills can get through
    met: Counter[str] = Counter()
    taken_again = 0
    for place, engine in enumerate(engines):
        draw = random.Random(seed * 1000 + place)
        straight = KilledRun(engine, work / "shards", work / f"{engine}-straight", most, draw)
        run = KilledRun(engine, work / "shards", work / f"{engine}-killed", most, draw, draw.randrange(60))
        for folder in (straight.work, run.work):
            folder.mkdir()
        straight.finish("forked")
        for number in range(place, kills, len(engines)):
            run.cycle(ways[number // len(engines) % len(ways)])
            print(f"{engine}: kill {number // len(engines) + 1}, {dict(run.met)}", file=sys.stderr, flush=True)
        run.finish(ways[-1])
        run.compare(straight)
        met += run.met
        taken_again += run.taken_again
    found = {"kills": kills, "seed": seed, **dict(sorted(met.items())), "steps_done_again": taken_again}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--by", nargs="+", choices=list(WAYS), default=["deepspeed", "torchrun"])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as name:
        print(json.dumps(soak(options.kills, options.by, options.engines, options.seed, Path(name))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
