"""`mellow-ds verify checkpoints`: a checkpoint of each back end and world goes on by each back end on each world.

Every source is written once and taken up by all. A run that goes on starts from another seed; what it has loaded is
compared bit for bit with the files by every rank (`runs.run_part`), and its next steps with a run in one piece.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mellow_ds.verify.back_ends import BACK_ENDS, BackEnd
from mellow_ds.verify.corpus import Corpus, make_corpus
from mellow_ds.verify.reference import largest_relative
from mellow_ds.verify.resume import TOLERANCE, Say, launch, steps_of
from mellow_ds.verify.runs import Notes, Part
from mellow_ds.verify.step_files import StepDifference, compare_steps
from mellow_ds.verify.table import markdown_table

STOP_AT = 3
LAST_STEP = 5
_SEED, _OTHER_SEED = 1, 99


@dataclass(frozen=True)
class TakenUp:
    """A checkpoint that went on elsewhere, compared with a run in one piece on one process."""

    source: BackEnd
    source_world: int
    target: BackEnd
    target_world: int
    ids_equal: bool  # of the examples of every step, and the learning rates
    loss: float  # largest relative difference over the steps after the checkpoint
    end: StepDifference  # of the last checkpoints

    @property
    def is_well(self) -> bool:
        """The same examples, counters, frozen weights and buffers; losses and weights within the tolerance."""
        exact = self.ids_equal and self.end.fixed_equal and self.end.position_equal
        return exact and max(self.loss, self.end.weight) <= TOLERANCE


Place = tuple[BackEnd, int]  # a back end and a number of processes
Pair = tuple[Place, Place]  # from, to


def every_pair(worlds: Sequence[int]) -> list[Pair]:
    """Each back end from every world to every world, by itself and by another one, which takes turns.

    With four worlds or more each back end goes on by each other. All by all on all worlds would be 1,600 runs.
    """
    back_ends = _compared()
    found: list[Pair] = []
    for number, source in enumerate(back_ends):
        for turn, (one, other) in enumerate(product(worlds, worlds)):
            another = back_ends[(number + 1 + turn % (len(back_ends) - 1)) % len(back_ends)]
            found += [((source, one), (source, other)), ((source, one), (another, other))]
    return found


def sample_pairs(worlds: Sequence[int]) -> list[Pair]:
    """A ring: each back end is saved from once and loaded by once, each world likewise, the two kinds in turn."""
    deepspeed, fsdp = ([b for b in _compared() if b.kind == kind] for kind in ("deepspeed", "fsdp"))
    mixed = [back_end for both in zip(deepspeed, fsdp, strict=True) for back_end in both]
    places = [(back_end, worlds[number % len(worlds)]) for number, back_end in enumerate(mixed)]
    return [(source, places[(number + 1) % len(places)]) for number, source in enumerate(places)]


def _compared() -> list[BackEnd]:
    """Offload changes nothing of what a checkpoint holds."""
    return [back_end for back_end in BACK_ENDS if back_end.name == back_end.name.partition(",")[0]]


def compare(pairs: Sequence[Pair], say: Say) -> list[TakenUp]:
    """One launch a world to write the sources, one a world to go on from them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("making sounds and packing them")
        corpus = make_corpus(folder)
        straight_part = Part(BackEnd("DDP", "fsdp", 0), folder / "straight", LAST_STEP, seed=_SEED)
        straight = launch(1, [straight_part], corpus, say)[0]
        sources = _write_sources(sorted_by_world({source for source, _ in pairs}), folder, corpus, say)
        found = []
        for world in sorted({target[1] for _, target in pairs}):
            own = [pair for pair in pairs if pair[1][1] == world]
            gone_on = folder / f"on-{world}"
            parts = [
                Part(target[0], gone_on / str(number), LAST_STEP, Path(sources[source][0].saved), _OTHER_SEED)
                for number, (source, target) in enumerate(own)
            ]
            for (source, target), notes in zip(own, launch(world, parts, corpus, say), strict=True):
                found.append(
                    TakenUp(
                        *source, *target,
                        steps_of(straight) == steps_of(sources[source]) + steps_of(notes),
                        largest_relative(straight[0].losses[STOP_AT:], notes[0].losses),
                        compare_steps(Path(straight[0].saved), Path(notes[0].saved)),
                    )
                )  # fmt: skip
            shutil.rmtree(gone_on)
    return found


def sorted_by_world(places: set[Place]) -> dict[int, list[Place]]:
    """The places of each world, in the order of `BACK_ENDS`."""
    worlds = sorted({world for _, world in places})
    return {world: [(b, world) for b in BACK_ENDS if (b, world) in places] for world in worlds}


def _write_sources(places: dict[int, list[Place]], folder: Path, corpus: Corpus, say: Say) -> dict[Place, list[Notes]]:
    """A checkpoint after `STOP_AT` steps of each place; the notes of its ranks."""
    found: dict[Place, list[Notes]] = {}
    for world, own in places.items():
        parts = [
            Part(back_end, folder / f"source-{world}-{number}", STOP_AT, seed=_SEED)
            for number, (back_end, _) in enumerate(own)
        ]
        found.update(zip(own, launch(world, parts, corpus, say), strict=True))
    return found


def tables(rows: Sequence[TakenUp]) -> str:
    """The largest difference of losses by back ends (over all worlds), and by worlds (over all back ends)."""
    back_ends = [b.name for b in BACK_ENDS if any(b in (row.source, row.target) for row in rows)]
    worlds = sorted({row.source_world for row in rows} | {row.target_world for row in rows})
    by_back_end: dict[tuple[str, str], list[TakenUp]] = {(row.source.name, row.target.name): [] for row in rows}
    by_world: dict[tuple[int, int], list[TakenUp]] = {(row.source_world, row.target_world): [] for row in rows}
    for row in rows:
        by_back_end[row.source.name, row.target.name].append(row)
        by_world[row.source_world, row.target_world].append(row)
    first = markdown_table(
        ["saved by, resumed by", *back_ends],
        [[a, *(_cell(by_back_end.get((a, b), [])) for b in back_ends)] for a in back_ends],
    )
    second = markdown_table(
        ["saved on, resumed on", *map(str, worlds)],
        [[str(a), *(_cell(by_world.get((a, b), [])) for b in worlds)] for a in worlds],
    )
    return f"{first}\n\n{second}"


def _cell(rows: Sequence[TakenUp]) -> str:
    if not rows:
        return ""
    worst = max(max(row.loss, row.end.weight) for row in rows)
    return f"{worst:.1e}" + ("" if all(row.is_well for row in rows) else " NOT AS WANTED")
