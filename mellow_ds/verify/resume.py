"""`mellow-ds verify resume`: N steps at once against k steps, a checkpoint, and N - k by other processes.

The resumed run starts from another seed: nothing that is not restored can be right by chance. On the same world all
has to be equal bit for bit, with dropout on too; on another one within 1e-5; the examples always.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mellow_ds.verify.back_ends import BACK_ENDS, BackEnd
from mellow_ds.verify.corpus import Corpus, make_corpus
from mellow_ds.verify.processes import run_ranks
from mellow_ds.verify.reference import largest_relative
from mellow_ds.verify.runs import NUM_STEPS, Notes, Part, run_parts
from mellow_ds.verify.step_files import StepDifference, compare_steps
from mellow_ds.verify.table import markdown_table

TOLERANCE = 1e-5  # on another world: of losses relative, of weights absolute
STOP_AT = 3  # steps before the checkpoint
_DROPOUT = 0.5
_OTHER_SEED = 99
_SECONDS_PER_PART = 30.0
_SECONDS_TO_START = 120.0
Say = Callable[[str], object]


@dataclass(frozen=True)
class Resumed:
    """How a resumed run compares to the one in one piece."""

    back_end: BackEnd
    dropout: float
    world_size: int  # of the run, and of its first part
    resumed_on: int  # processes
    ids_equal: bool  # of the examples of every step, and the learning rates
    loss: float  # largest relative difference over the steps after the checkpoint
    end: StepDifference  # of the last checkpoints

    @property
    def is_well(self) -> bool:
        """As it has to be."""
        if not (self.ids_equal and self.end.fixed_equal and self.end.position_equal):
            return False
        if self.resumed_on == self.world_size:
            return self.loss == 0 and self.end.is_none
        return max(self.loss, self.end.weight) <= TOLERANCE


def compare(back_ends: Sequence[BackEnd], world_size: int, others: Sequence[int], say: Say) -> list[Resumed]:
    """For each back end: the same world, without and with dropout, and the other worlds, without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("making sounds and packing them")
        corpus = make_corpus(folder)
        found = []
        parts = [
            Part(back_end, folder / f"{number}-{int(dropout > 0)}", NUM_STEPS, dropout=dropout)
            for number, back_end in enumerate(back_ends)
            for dropout in (0.0, _DROPOUT)
        ]
        firsts = [replace(part, folder=_beside(part, "first"), last_step=STOP_AT) for part in parts]
        whole = launch(world_size, [*parts, *firsts], corpus, say)
        straight, first = whole[: len(parts)], whole[len(parts) :]
        for other in (world_size, *others):
            own = [number for number, part in enumerate(parts) if other == world_size or not part.dropout]
            again = [
                replace(
                    parts[number], folder=_beside(parts[number], str(other)), seed=_OTHER_SEED,
                    start=Path(first[number][0].saved),
                )
                for number in own
            ]  # fmt: skip
            for number, second in zip(own, launch(other, again, corpus, say), strict=True):
                part = parts[number]
                found.append(
                    Resumed(
                        part.back_end, part.dropout, world_size, other,
                        steps_of(straight[number]) == steps_of(first[number]) + steps_of(second),
                        largest_relative(straight[number][0].losses[STOP_AT:], second[0].losses),
                        compare_steps(Path(straight[number][0].saved), Path(second[0].saved)),
                    )
                )  # fmt: skip
    return sorted(found, key=lambda row: back_ends.index(row.back_end))


def choose(quick: bool) -> tuple[BackEnd, ...]:
    """All back ends, or one of each kind."""
    return tuple(b for b in BACK_ENDS if not quick or b.name in ("ZeRO-2", "ZeRO-3", "FSDP2 stage 3"))


def launch(world_size: int, parts: Sequence[Part], corpus: Corpus, say: Say) -> list[list[Notes]]:
    """Run the parts one after the other in one set of processes; notes by part and rank."""
    say(f"{len(parts)} runs on {world_size} process{'es' * (world_size > 1)}")
    seconds = _SECONDS_TO_START + _SECONDS_PER_PART * len(parts) * max(world_size / 2, 1)
    by_rank = run_ranks(world_size, run_parts, list(parts), corpus, seconds=seconds)
    return [[notes[number] for notes in by_rank] for number in range(len(parts))]


def steps_of(notes: Sequence[Notes]) -> list[tuple[float, list[str]]]:
    """(learning rate, ids of the examples over the ranks in order) of each step: the same for every world."""
    ids = [[i for rank in step for i in rank] for step in zip(*(rank.ids for rank in notes), strict=True)]
    return list(zip(notes[0].learning_rates, ids, strict=True))


def _beside(part: Part, suffix: str) -> Path:
    return part.folder.with_name(f"{part.folder.name}-{suffix}")


def table(rows: Sequence[Resumed]) -> str:
    """A line a resumed run."""
    header = [
        "back end", "dropout", "processes", "examples", "losses", "weights", "optimizer state", "frozen parts",
        "counters", "random states",
    ]  # fmt: skip
    lines = []
    for row in rows:
        end, same = row.end, row.resumed_on == row.world_size
        lines.append(
            [
                row.back_end.name, f"{row.dropout:g}", f"{row.world_size} -> {row.resumed_on}", _equal(row.ids_equal),
                _number(row.loss), _number(end.weight), _equal(end.moments_equal) if same else "-",
                _equal(end.fixed_equal), _equal(end.state_equal if same else end.position_equal),
                _equal(end.random_equal) if same else "-",
            ]
        )  # fmt: skip
        if not row.is_well:
            lines[-1][0] += " (NOT AS WANTED)"
    return markdown_table(header, lines)


def _equal(is_equal: bool) -> str:
    return "equal" if is_equal else "DIFFER"


def _number(difference: float) -> str:
    return f"{difference:.1e}" if difference else "equal"
