"""What a check of collectives came to: a table, what is wrong, and one line that says it all."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mellow_ds.preflight.bandwidth import Link, Measured

_MIB = 1 << 20
_MUCH_SLOWER = 0.5  # of the median: below, a link or a rank is named


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    host: str
    address: str  # towards the first rank
    interface: str  # that collectives are bound to, as far as it can be known
    local_rank: int = 0


@dataclass(frozen=True)
class Outcome:
    """Of all ranks."""

    backend: str
    places: Sequence[Place]  # of each rank
    num_checks: int
    wrong: Mapping[int, Sequence[str]] = field(default_factory=dict)  # by rank
    lacking: Mapping[str, str] = field(default_factory=dict)  # check -> why the back end has it not
    measured: Sequence[Measured] = ()
    links: Sequence[Link] = ()
    rank_rates: Sequence[float] = ()  # gigabytes a second that each rank adds by itself

    @property
    def hosts(self) -> list[str]:
        """A name for the host of each rank: its own, with its address where several hosts have one name."""
        return host_names(self.places)


def host_names(places: Sequence[Place]) -> list[str]:
    """Of the host of each rank: its own, or its address where several hosts have one name."""
    addresses: dict[str, set[str]] = {}
    for place in places:
        addresses.setdefault(place.host, set()).add(place.address)
    return [place.host if len(addresses[place.host]) == 1 else place.address for place in places]


def report(outcome: Outcome) -> list[str]:
    """The lines, the verdict last."""
    lines = [_who(outcome)]
    for host in dict.fromkeys(outcome.hosts):
        ranks = [rank for rank, name in enumerate(outcome.hosts) if name == host]
        bound = outcome.places[ranks[0]].interface
        lines.append(f"  {host}: rank {', '.join(map(str, ranks))}{f', on {bound}' if bound else ''}")
    lines += [f"not in {outcome.backend}: {name} ({why})" for name, why in outcome.lacking.items()]
    if outcome.measured:
        lines += ["", f"{'collective':<15} {'bytes':>12} {'time, us':>12} {'algbw, GB/s':>12} {'busbw, GB/s':>12}"]
        lines += [
            f"{one.collective:<15} {one.num_bytes:>12} {one.seconds * 1e6:>12.1f} {one.algorithm_gigabytes:>12.3f} "
            f"{one.bus_gigabytes:>12.3f}"
            for one in outcome.measured
        ]
    if outcome.links:
        lines += ["", f"{'link':<40} {'one way, us':>12} {'GB/s':>12}"]
        lines += [
            f"{f'{link.one} - {link.other}':<40} {link.latency_seconds * 1e6:>12.1f} {link.gigabytes:>12.3f}"
            for link in outcome.links
        ]
    lines += ["", *(f"WRONG: {text}" for text in _wrong(outcome))]
    return [*lines, verdict(outcome)]


def verdict(outcome: Outcome) -> str:
    """One line."""
    wrong = _wrong(outcome)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"verdict: WRONG VALUES over {outcome.backend}: {wrong[0]}{more}"
    bound = ", ".join(sorted({place.interface for place in outcome.places} - {""}))
    parts = [f"{_who(outcome)}{f' ({bound})' if bound else ''}", f"all values of {outcome.num_checks} checks right"]
    reduced = [one for one in outcome.measured if one.collective == "all_reduce"]
    if reduced:
        parts.append(
            f"all-reduce {reduced[-1].bus_gigabytes:.2f} GB/s (bus) at {reduced[-1].num_bytes / _MIB:.0f} MiB, "
            f"{reduced[0].seconds * 1e6:.0f} us at {reduced[0].num_bytes} bytes"
        )
    slow = _slow(outcome)
    return f"verdict: {'right, but uneven' if slow else 'good'}: {'; '.join([*parts, *slow])}"


def _who(outcome: Outcome) -> str:
    return f"{_count(len(outcome.places), 'rank')} on {_count(len(set(outcome.hosts)), 'host')} over {outcome.backend}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _wrong(outcome: Outcome) -> list[str]:
    return [f"rank {rank} ({outcome.hosts[rank]}): {text}" for rank, texts in outcome.wrong.items() for text in texts]


def _slow(outcome: Outcome) -> list[str]:
    """The link and the rank that are far behind the others."""
    found = []
    links, rates = outcome.links, outcome.rank_rates
    if len(links) > 2:
        middle, slowest = statistics.median(link.gigabytes for link in links), min(links, key=lambda one: one.gigabytes)
        if slowest.gigabytes < _MUCH_SLOWER * middle:
            found.append(
                f"SLOW LINK {slowest.one} - {slowest.other}: {slowest.gigabytes:.2f} GB/s, the others {middle:.2f}"
            )
    if rates:
        middle, least = statistics.median_high(rates), min(rates)
        if least < _MUCH_SLOWER * middle:
            rank = rates.index(least)
            found.append(
                f"SLOW RANK {rank} ({outcome.hosts[rank]}): adds {least:.1f} GB/s by itself, the others {middle:.1f}"
            )
    return found
