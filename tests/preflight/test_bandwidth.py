"""Bandwidths by nccl-tests' definitions, and what is measured between real ranks."""

import pytest
import torch

from mellow_ds.preflight.bandwidth import Measured, bus_factor, measure, measure_links, measure_ranks
from mellow_ds.world import World
from tests.ranks import run_ranks


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bus_bandwidth_is_what_a_ring_sends_over_each_link(size: int) -> None:
    """Counted turn by turn: in a ring each turn a rank sends one part of `size` of the buffer."""
    part = 1 / size
    reduce_scatter_turns, all_gather_turns = size - 1, size - 1
    assert bus_factor("reduce_scatter", size) == pytest.approx(reduce_scatter_turns * part)
    assert bus_factor("all_gather", size) == pytest.approx(all_gather_turns * part)
    assert bus_factor("all_reduce", size) == pytest.approx((reduce_scatter_turns + all_gather_turns) * part)
    assert bus_factor("all_to_all", size) == pytest.approx((size - 1) * part)
    assert bus_factor("broadcast", size) == 1  # every byte goes over every link once


def test_gigabytes_are_of_ten_to_the_ninth() -> None:
    measured = Measured("all_reduce", 2_000_000_000, 0.5, bus_factor("all_reduce", 4))
    assert measured.algorithm_gigabytes == pytest.approx(4.0)
    assert measured.bus_gigabytes == pytest.approx(6.0)


def measured_here(
    world: World,
) -> tuple[list[tuple[str, int, float]], list[tuple[str, str, float, float]], list[float]]:
    device = torch.device("cpu")
    found = measure(world, device, [8, 5000], 0.001, lambda _: None)
    links = measure_links(world, device, range(world.size), "abc", lambda _: None)
    return (
        [(one.collective, one.num_bytes, one.seconds) for one in found],
        [(link.one, link.other, link.latency_seconds, link.gigabytes) for link in links],
        measure_ranks(world, device),
    )


@pytest.mark.slow
def test_all_ranks_come_to_the_same_numbers() -> None:
    first, *others = run_ranks(3, measured_here)
    assert all(other == first for other in others)
    found, links, rates = first
    assert [name for name, _, _ in found[::2]] == [
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "broadcast",
        "all_to_all",
    ]
    # whole numbers of 4 bytes for each of 3 ranks: 8 bytes are 12, 5,000 are 5,004
    assert {num_bytes for _, num_bytes, _ in found} == {12, 5004}
    assert all(0 < seconds < 10 for _, _, seconds in found)
    assert [(one, other) for one, other, _, _ in links] == [("a", "b"), ("b", "c"), ("c", "a")]
    assert all(0 < latency < 1 and rate > 0 for _, _, latency, rate in links)
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates)
