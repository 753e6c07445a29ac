"""`mellow-ds verify equivalence`: every back end, world size and accumulation takes the steps of one big batch.

Differences of losses and gradient norms are relative to the reference's of the same step; those of weights are
absolute, the largest over all numbers of all trained weights. Frozen weights and buffers must be those that were there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mellow_ds.engine.protocol import Engine
from mellow_ds.engine.sharded import whole_tensor
from mellow_ds.errors import FaultError
from mellow_ds.verify.back_ends import BACK_ENDS, BackEnd
from mellow_ds.verify.processes import run_ranks
from mellow_ds.verify.reference import Trajectory, arrays, largest, largest_relative, train_plainly
from mellow_ds.verify.small import TRAIN, small_model
from mellow_ds.verify.steps import examples_of, learning_rate_of, micro_batches
from mellow_ds.verify.table import markdown_table
from mellow_ds.world import World

LOSS_TOLERANCE = 1e-5  # relative, of losses and gradient norms
WEIGHT_TOLERANCE = 1e-4  # absolute
_SEED = 1
_SECONDS_PER_CASE = 60.0  # that a launch gets for each, beside
_SECONDS_TO_START = 120.0


@dataclass(frozen=True)
class Case:
    """One back end on one world, with one accumulation."""

    back_end: BackEnd
    world_size: int
    accumulation: int


@dataclass(frozen=True)
class Difference:
    """How far a case is from the reference."""

    case: Case
    loss: float  # largest relative difference over the steps
    grad_norm: float  # likewise
    weight: float  # largest absolute difference over the final weights
    frozen_equal: bool  # frozen weights and buffers are bit for bit what they were

    @property
    def is_well(self) -> bool:
        """Within the tolerances."""
        near = max(self.loss, self.grad_norm) <= LOSS_TOLERANCE and self.weight <= WEIGHT_TOLERANCE
        return near and self.frozen_equal


def all_cases(worlds: Sequence[int], accumulations: Sequence[int]) -> list[Case]:
    """Everything with everything."""
    return [Case(b, world, parts) for world in worlds for b in BACK_ENDS for parts in accumulations]


def sample_cases(worlds: Sequence[int], accumulations: Sequence[int]) -> list[Case]:
    """Every back end once, so dealt out that each kind of them meets every world and every accumulation."""
    found = []
    for number, back_end in enumerate(BACK_ENDS):
        lap, place = divmod(number, len(worlds))
        found.append(Case(back_end, worlds[place], accumulations[(place + lap) % len(accumulations)]))
    return found


def compare(cases: Sequence[Case], num_steps: int, say: Callable[[str], object] = lambda _: None) -> list[Difference]:
    """Train the reference here and all cases in ranks of their own, one launch a world size; in the order of `cases`.

    Raises `FaultError` where a rank fails or is not done in time.
    """
    torch.set_num_threads(1)
    reference = train_plainly(num_steps, _SEED)
    found: dict[Case, Difference] = {}
    for world_size in sorted({case.world_size for case in cases}):
        own = [case for case in cases if case.world_size == world_size]
        say(f"{len(own)} cases on {world_size} process{'es' * (world_size > 1)}")
        seconds = _SECONDS_TO_START + _SECONDS_PER_CASE * len(own)
        by_rank = run_ranks(world_size, run_cases, own, num_steps, seconds=seconds)
        for case, trajectory in zip(own, by_rank[0], strict=True):
            found[case] = difference(case, trajectory, reference)
    return [found[case] for case in cases]


def run_cases(world: World, cases: Sequence[Case], num_steps: int) -> list[Trajectory]:
    """On a rank: what each case comes to, on rank 0."""
    found = [run_case(world, case, num_steps) for case in cases]
    return found if world.is_main else []


def run_case(world: World, case: Case, num_steps: int) -> Trajectory:
    """Train one case. Raises `FaultError` where this rank's weights are not those that a checkpoint would get."""
    model = small_model(_SEED)
    audio_tokens = model.num_audio_tokens
    engine = case.back_end.build(model, TRAIN, world, case.accumulation)
    found = Trajectory()
    for step in range(num_steps):
        batches = micro_batches(examples_of(step), world, case.accumulation, audio_tokens)
        result = engine.train_step(batches, learning_rate_of(step), TRAIN.max_grad_norm)
        found.losses.append(result.loss)
        found.grad_norms.append(result.grad_norm)
    found.weights = arrays((state.name, state.weight) for state in engine.parameter_states())
    found.fixed = arrays(engine.fixed_states())
    _check_own_weights(engine, found.weights, world, case)
    engine.close()
    return found


def _check_own_weights(engine: Engine, weights: dict[str, np.ndarray], world: World, case: Case) -> None:
    with engine.whole_model() as whole:
        own = arrays((name, whole_tensor(p, p.device)) for name, p in whole.named_parameters() if name in weights)
        for name, weight in weights.items():
            if not np.array_equal(own[name], weight):
                raise FaultError(f"{case}: {name} on rank {world.rank} is not what a checkpoint of it would hold")


def difference(case: Case, found: Trajectory, reference: Trajectory) -> Difference:
    """Of a case from the reference."""
    start = arrays(small_model(_SEED).state_dict().items())
    same = all(np.array_equal(array, start[name]) for name, array in found.fixed.items())
    complete = set(found.weights) == set(reference.weights) and set(found.fixed) | set(found.weights) | _tied() == set(
        start
    )
    if not complete:
        raise FaultError(f"{case}: its weights are not those of the reference by name")
    return Difference(
        case,
        largest_relative(found.losses, reference.losses),
        largest_relative(found.grad_norms, reference.grad_norms),
        largest(float(np.abs(found.weights[name] - weight).max()) for name, weight in reference.weights.items()),
        same,
    )


def _tied() -> set[str]:
    """Names of a state dict that stand for a weight which has another name already."""
    model = small_model(_SEED)
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def table(differences: Sequence[Difference]) -> str:
    """A line a case."""
    rows = [
        [
            d.case.back_end.name, str(d.case.world_size), str(d.case.accumulation),
            f"{d.loss:.1e}", f"{d.grad_norm:.1e}", f"{d.weight:.1e}",
            "equal" if d.frozen_equal else "DIFFER", "" if d.is_well else "PAST THE TOLERANCE",
        ]
        for d in differences
    ]  # fmt: skip
    header = ["back end", "processes", "accumulation", "loss", "gradient norm", "weights", "frozen parts", ""]
    if all(not row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return markdown_table(header, rows)


def facts(num_steps: int) -> dict[str, Any]:
    """What a reader of the table has to know of the reference."""
    reference = train_plainly(num_steps, _SEED)
    start = arrays(small_model(_SEED).named_parameters())
    return {
        "steps": num_steps,
        "clipped_steps": sum(norm > TRAIN.max_grad_norm for norm in reference.grad_norms),
        "first_loss": reference.losses[0],
        "last_loss": reference.losses[-1],
        "largest_weight": max(float(np.abs(w).max()) for w in reference.weights.values()),
        "largest_movement": max(float(np.abs(w - start[name]).max()) for name, w in reference.weights.items()),
    }
