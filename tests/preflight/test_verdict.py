"""The last line of a check of collectives, from made-up outcomes."""

from mellow_ds.preflight.bandwidth import Link, Measured
from mellow_ds.preflight.verdict import Outcome, Place, report, verdict

PLACES = tuple(Place("node1" if rank < 2 else "node2", f"10.0.0.{1 + rank // 2}", "e0", rank % 2) for rank in range(4))
SPEEDS = (Measured("all_reduce", 8, 50e-6, 1.5), Measured("all_reduce", 16 << 20, 0.02, 1.5))


def test_all_is_well() -> None:
    line = verdict(Outcome("gloo", PLACES, 70, measured=SPEEDS))
    assert line == (
        "verdict: good: 4 ranks on 2 hosts over gloo (e0); all values of 70 checks right; "
        "all-reduce 1.26 GB/s (bus) at 16 MiB, 50 us at 8 bytes"
    )


def test_wrong_values_come_before_all_else() -> None:
    outcome = Outcome("nccl", PLACES, 70, {3: ["broadcast: wrong", "reduce: wrong"]}, measured=SPEEDS)
    assert verdict(outcome) == "verdict: WRONG VALUES over nccl: rank 3 (node2): broadcast: wrong, and 1 more"
    lines = report(outcome)
    assert lines[-1] == verdict(outcome)
    assert lines[-3:-1] == ["WRONG: rank 3 (node2): broadcast: wrong", "WRONG: rank 3 (node2): reduce: wrong"]


def test_a_slow_link_and_a_slow_rank_are_named() -> None:
    links = [Link("a", "b", 1e-5, 10.0), Link("b", "c", 1e-5, 11.0), Link("c", "a", 1e-5, 1.0)]
    line = verdict(Outcome("gloo", PLACES, 70, links=links))
    assert "right, but uneven" in line
    assert "SLOW LINK c - a: 1.00 GB/s, the others 10.00" in line
    line = verdict(Outcome("gloo", PLACES, 70, rank_rates=[10.0, 9.0, 2.0, 10.0]))
    assert "SLOW RANK 2 (node2): adds 2.0 GB/s by itself, the others 10.0" in line


def test_hosts_of_one_name_are_told_apart_by_their_addresses() -> None:
    places = [Place("node", "10.0.0.1", "e0"), Place("node", "10.0.0.2", "e0")]
    assert report(Outcome("gloo", places, 1))[1:3] == ["  10.0.0.1: rank 0, on e0", "  10.0.0.2: rank 1, on e0"]


def test_what_a_back_end_has_not_is_said() -> None:
    outcome = Outcome("gloo", PLACES, 70, lacking={"all_reduce sum of 1 uint8": "Invalid scalar type"})
    assert "not in gloo: all_reduce sum of 1 uint8 (Invalid scalar type)" in report(outcome)
