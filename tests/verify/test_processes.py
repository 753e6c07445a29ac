"""Ranks as processes: what they return, and what is said of one that fails, crashes or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from mellow_ds.errors import FaultError
from mellow_ds.verify.processes import run_ranks
from mellow_ds.world import World


def add_up(world: World, start: int) -> tuple[int, int, str]:
    total = torch.tensor(start + world.rank)
    dist.all_reduce(total)
    return world.rank, int(total), os.environ["OF_THE_TEST"]


def test_every_rank_returns_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "seen")  # set after the server has started, and passed on
    assert run_ranks(3, add_up, 10) == [(0, 33, "seen"), (1, 33, "seen"), (2, 33, "seen")]


def fail_on_one(world: World) -> None:
    print(f"rank {world.rank} has come here", flush=True)
    if world.rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_a_fault_of_a_rank_is_shown_with_what_it_said() -> None:
    started = time.monotonic()
    with pytest.raises(FaultError, match=r"(?s)rank 1: .*ValueError: the reason.*rank 1 has come here"):
        run_ranks(2, fail_on_one)
    assert time.monotonic() - started < 60


def crash_on_one(world: World) -> None:
    if world.rank == 0:
        os._exit(7)
    dist.barrier()


def test_a_rank_that_ends_without_a_word_is_named_with_its_code() -> None:
    with pytest.raises(FaultError, match="rank 0: ended with code 7 and without a message"):
        run_ranks(2, crash_on_one)


def hang(world: World) -> int:
    time.sleep(300 * world.rank)
    return os.getpid()


def test_a_rank_that_hangs_is_named_at_the_deadline_and_killed() -> None:
    started = time.monotonic()
    with pytest.raises(FaultError, match=r"1 of 2 ranks .*\nrank 1: was not done in time"):
        run_ranks(2, hang, seconds=20)
    assert time.monotonic() - started < 60
