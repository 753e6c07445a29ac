"""Sorting on disk: what goes in comes out in order, whatever the number of runs and merges, and may go on after."""

import random
from pathlib import Path

import pytest

from mellow_ds.packing.sorted_runs import SortedRuns


@pytest.mark.parametrize("count", [0, 1, 50, 20_000])
def test_any_number_of_items_comes_out_sorted(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    items = [draw.randbytes(draw.choice((0, 1, 7, 300))) for _ in range(count)]
    runs = SortedRuns(tmp_path, "items", run_bytes=2_000)
    for item in items:
        runs.add(item)
    assert len(list(tmp_path.iterdir())) < 100, "runs are merged before there are too many"
    assert list(runs.merged()) == sorted(items)
    runs.add(b"\x80")
    assert list(runs.merged()) == sorted([*items, b"\x80"])
    runs.remove()
    assert list(runs.merged()) == []
    assert list(tmp_path.iterdir()) == []


def test_what_memory_holds_is_not_written(tmp_path: Path) -> None:
    runs = SortedRuns(tmp_path, "items")
    for number in range(1_000):
        runs.add(str(number).encode())
    assert len(list(runs.merged())) == 1_000
    assert list(tmp_path.iterdir()) == []


def test_items_longer_than_a_block_are_whole(tmp_path: Path) -> None:
    items = [bytes([number]) * 500_000 for number in (3, 1, 2)]
    runs = SortedRuns(tmp_path, "items", run_bytes=1)
    for item in items:
        runs.add(item)
    assert list(runs.merged()) == sorted(items)
