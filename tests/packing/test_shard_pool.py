"""Work on shards in processes: results in order, progress, errors as they are, and a killed worker named."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from mellow_ds.errors import FaultError, ShardError
from mellow_ds.packing.shard_pool import each_shard


class Bar:
    """Counts as tqdm does."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, count: int = 1) -> None:
        self.n += count


def work(task: int, count: Callable[[], None]) -> tuple[int, int]:
    for _ in range(task):
        count()
    time.sleep(0.05 * (task == 1))  # the first is not the first to be done
    return task * task, os.getpid()


def fail(task: int, count: Callable[[], None]) -> int:
    if task == 2:
        raise ShardError("shard 2 is not there")
    for _ in range(100):
        time.sleep(0.01)
        count()
    return task


def die(task: int, _: Callable[[], None]) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_results_are_in_the_order_of_the_tasks() -> None:
    for workers in (1, 2):
        bar = Bar()
        results = each_shard(work, [1, 2, 3, 4], workers, bar)
        assert [square for square, _ in results] == [1, 4, 9, 16]
        assert bar.n == 10
        assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)
    assert each_shard(work, [], 2, Bar()) == []


def test_an_error_comes_out_and_stops_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(ShardError, match="shard 2 is not there"):
        each_shard(fail, range(1, 61), 2, Bar())
    assert time.monotonic() - started < 15  # the others would take 30 s


def test_a_killed_worker_is_named() -> None:
    with pytest.raises(FaultError, match="fewer --workers"):
        each_shard(die, [1, 2], 2, Bar())
