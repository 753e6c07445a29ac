"""Checks of collectives: silent over a back end that is right, and naming what is wrong over one that lies."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from mellow_ds.preflight.checks import Wrong, checks, run_check, values
from mellow_ds.world import World
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def run_all(world: World, only: str = "") -> tuple[int, list[str]]:
    """(number of checks, what is wrong or lacking)."""
    found = [(check.name, run_check(check, world.rank)) for check in checks(world, CPU, "gloo") if only in check.name]
    return len(found), [f"{name}: {result}" for name, result in found if result is not None]


@pytest.mark.slow
def test_gloo_is_right_on_three_ranks() -> None:
    for number, wrong in run_ranks(3, run_all):
        assert wrong == []
        assert number > 60


def lying(world: World, name: str, spoil: Callable[[list], None]) -> list[str]:
    """What is found where rank 1's `torch.distributed.NAME` spoils its result."""
    true = getattr(dist, name)

    def lies(*args: object, **options: object) -> object:
        result = true(*args, **options)
        spoil(list(args))
        return result

    if world.rank == 1:
        setattr(dist, name, lies)
    try:
        return run_all(world, " of 1003 ")[1]
    finally:
        setattr(dist, name, true)


def add_one(arguments: list) -> None:
    target = arguments[0][-1] if isinstance(arguments[0], list) else arguments[0]
    if isinstance(target, torch.Tensor) and target.numel() > 5:
        target[5] += 1


LIED_ABOUT = {
    "all_reduce": "all_reduce sum", "all_gather": "all_gather of", "all_gather_into_tensor": "all_gather_into_tensor",
    "reduce_scatter_tensor": "reduce_scatter_tensor", "broadcast": "broadcast from", "all_to_all_single": "all_to_all",
    "reduce": "reduce to rank 1",
}  # fmt: skip


def all_lies(world: World) -> dict[str, list[str]]:
    return {name: lying(world, name, add_one) for name in LIED_ABOUT}


@pytest.mark.slow
def test_a_wrong_value_is_named_by_rank_and_collective() -> None:
    right, liar = run_ranks(2, all_lies)
    for name, words in LIED_ABOUT.items():
        assert right[name] == [], name
        assert any(line.startswith(words) for line in liar[name]), (name, liar[name][:3])
        assert all(" of " in line and "values are wrong, first number " in line for line in liar[name])


def test_what_a_rank_brings_differs_from_rank_to_rank_and_is_exact() -> None:
    """Else one rank's values in place of another's would pass; bfloat16 is exact to 256."""
    brought = [values(rank, 7, torch.int64, CPU) for rank in range(5)]
    assert len({tuple(one.tolist()) for one in brought}) == 5
    assert max(int(one.max()) for one in brought) * 50 <= 256


def test_a_wrong_value_in_words() -> None:
    text = str(Wrong(3, "broadcast from rank 0 of 5 int64", 2, 5, "number 1: 7 instead of 3"))
    assert text == "broadcast from rank 0 of 5 int64: 2 of 5 values are wrong, first number 1: 7 instead of 3"
