"""Ranks killed at random moments of a save: the newest complete step always loads, and is the one that was promised.

    PYTHONPATH=. python tests/soak/kill_during_save.py --kills 200 [--seed 0]

A cycle starts two ranks that go on from the newest step and save one after the other, in the background and waited for
in turn, at times the same step again. As soon as a save is on its way, at a random moment after it, one rank gets
SIGKILL, or both at once. Then every published step must be whole (sizes, SHA-256), the newest must load on another
world and hold the values of its step, and must not be older than what a rank knew to be published. Prints a summary as
JSON with what the kills met; exit code 1 on a difference, a hang, or a process that is left.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.checkpoint.load import load_checkpoint
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.step_folder import step_of
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.world import World
from tests.checkpoint.plain import PlainEngine
from tests.ranks import free_port

RANKS = 2
SIZES = (400_000, 200_000, 60_000, 2_000)  # elements: 8 MB with their moments, some tens of milliseconds to write
START_SECONDS = 60
END_SECONDS = 20
MOST_DELAY = 0.06  # seconds after a save has begun; about as long as one takes


def run_rank(rank: int, port: int, folder: Path, journal: Path, again: bool) -> None:
    """Go on from the newest step and save until killed. `again`: begin with the newest step itself."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    world = World(rank, RANKS, rank, "test", RANKS)
    store = CheckpointStore(folder, 2, Peers(world))
    newest = store.newest()
    step = 0 if newest is None else (step_of(newest) or 0) - int(again)
    ready_mark(journal, rank).touch()
    while True:
        step += 1
        outcome = store.begin(step, PlainEngine(step, SIZES), {"num_updates": step, "step": step})
        while outcome is None:
            if step % 2:
                outcome = store.wait()
            else:  # as the trainer does, after each step
                time.sleep(0.002)
                totals = torch.tensor(store.vote())
                dist.all_reduce(totals)
                outcome = store.settle(*totals.tolist())
        assert not outcome.error, outcome.error
        if rank == 0:
            with journal.open("a") as file:
                file.write(f"{step}\n")


def cycle(folder: Path, journal: Path, draw: random.Random, again: bool) -> str:
    """Start the ranks, kill at a moment of a save; what the kill met."""
    context = multiprocessing.get_context("fork")  # torch is imported already
    port = free_port()
    before = len(promised(journal))
    for rank in range(RANKS):
        ready_mark(journal, rank).unlink(missing_ok=True)
    ranks = [context.Process(target=run_rank, args=(rank, port, folder, journal, again)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    wanted = draw.randrange(4)  # whole saves of this cycle before the one that is cut
    deadline = time.monotonic() + START_SECONDS
    while (
        not all(ready_mark(journal, rank).exists() for rank in range(RANKS))
        or len(promised(journal)) < before + wanted
        or not list(folder.glob(".writing-*"))
    ):
        assert time.monotonic() < deadline, "no save in time"
        assert all(rank.is_alive() for rank in ranks), "a rank ended by itself"
    time.sleep(draw.random() * MOST_DELAY)
    killed = draw.choice([[0], [1], [0, 1]])
    for number in killed:
        os.kill(ranks[number].pid or 0, signal.SIGKILL)
    for rank in ranks:  # one that is left alone finds the connection broken
        rank.join(END_SECONDS)
        assert rank.exitcode is not None, "a rank that lost its peer did not end"
    return what_is_left(folder)


def ready_mark(journal: Path, rank: int) -> Path:
    """A file that says that a rank has joined the others."""
    return journal.with_name(f"ready-{rank}")


def promised(journal: Path) -> list[int]:
    """Steps that rank 0 knew to be published; a kill may leave a part of a line."""
    return [int(line) for line in journal.read_text().split("\n")[:-1]] if journal.exists() else []


def what_is_left(folder: Path) -> str:
    """At which moment of a save it was."""
    aside = list(folder.glob(".writing-*"))
    if not aside:
        return "published"
    names = {path.name for path in aside[0].iterdir()}
    if "files.json" in names:
        return "being published"
    parts = sum(name.startswith("part-") for name in names)
    return "written" if parts == RANKS else "half written" if names else "begun"


def check(folder: Path, journal: Path) -> None:
    """Every step is whole; the newest one loads on one rank and is what it says."""
    store = CheckpointStore(folder, 2, Peers(World()))
    newest = store.newest()
    known = promised(journal)
    if newest is None:
        assert not known, f"step {known[-1]} was published and is gone"
        return
    step = step_of(newest)
    assert step is not None
    assert not known or step >= max(known), f"step {max(known)} was published, the newest is {step}"
    for path in store.steps():
        verify_checkpoint(path)
    engine = PlainEngine(-1)
    state = load_checkpoint(newest, engine, World())
    assert state["step"] == step
    expected: dict[str, Any] = {s.name: s for s in PlainEngine(step, SIZES).parameter_states()}
    assert engine.loaded.keys() == expected.keys()
    for name, found in engine.loaded.items():
        assert torch.equal(found.weight, expected[name].weight), f"{name} of step {step} has other values"
        assert all(torch.equal(found.moments[key], moment) for key, moment in expected[name].moments.items())


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, started, met = random.Random(options.seed), time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="kill-during-save-") as name:
        folder, journal = Path(name) / "checkpoints", Path(name) / "journal"
        for number in range(options.kills):
            met[cycle(folder, journal, draw, again=number % 3 == 0)] += 1
            check(folder, journal)
        saves = len(promised(journal))
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"kills": options.kills, "seed": options.seed, "saves": saves, **met, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
