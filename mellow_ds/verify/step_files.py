"""How far two step folders of one run are apart, from their files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mellow_ds.checkpoint.snapshot import MOMENT_SEPARATOR
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER, random_file, read_state
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.verify.reference import largest

_OWN_TO_A_START = ("metrics", "world_size")  # differ between a run in one piece and one in two


@dataclass(frozen=True)
class StepDifference:
    """What differs, and by how much."""

    weight: float  # largest absolute difference of the trained weights
    fixed_equal: bool  # frozen weights and buffers, bit for bit
    moments_equal: bool  # optimizer state, bit for bit, with its counts
    position_equal: bool  # counters and data position
    state_equal: bool  # these, schedule and clipping threshold
    random_equal: bool  # generator states of the ranks that both have

    @property
    def is_none(self) -> bool:
        """Everything is the same, bit for bit."""
        exact = self.fixed_equal and self.moments_equal and self.state_equal and self.random_equal
        return exact and self.weight == 0


def compare_steps(one: Path, other: Path) -> StepDifference:
    """Read both; `CheckpointError` where a file cannot be read."""
    with TensorFiles(one, OPTIMIZER) as a, TensorFiles(other, OPTIMIZER) as b:
        moments_equal = not _differing(a, b)
        trained = {name.partition(MOMENT_SEPARATOR)[0] for name in a.names()}
    with TensorFiles(one, MODEL) as a, TensorFiles(other, MODEL) as b:
        differing = _differing(a, b)
        common = trained & set(a.names()) & set(b.names())
        weight = largest(float((a.read(name) - b.read(name)).abs().max()) for name in common)
    states = [
        {k: v for k, v in read_state(folder).items() if k not in _OWN_TO_A_START} for folder in (one, other)
    ]  # fmt: skip
    return StepDifference(
        weight=weight,
        fixed_equal=not differing - trained,
        moments_equal=moments_equal,
        position_equal=_position(states[0]) == _position(states[1]),
        state_equal=states[0] == states[1],
        random_equal=_random_equal(one, other),
    )


def _differing(one: TensorFiles, other: TensorFiles) -> set[str]:
    """Names that one of the two lacks, or whose tensors are not equal bit for bit."""
    names, others = set(one.names()), set(other.names())
    return (names ^ others) | {name for name in names & others if not torch.equal(one.read(name), other.read(name))}


def _position(state: dict[str, Any]) -> tuple[Any, Any]:
    return state["progress"], state["stream"]


def _random_equal(one: Path, other: Path) -> bool:
    rank = 0
    while (one / random_file(rank)).is_file() and (other / random_file(rank)).is_file():
        if (one / random_file(rank)).read_bytes() != (other / random_file(rank)).read_bytes():
            return False
        rank += 1
    return rank > 0
