"""Hosts held against one another: what most have, who has something else, and how that is said."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from mellow_ds.doctor.findings import Finding
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.preflight.survey import HostReport, Survey

T = TypeVar("T", bound=Hashable)
Rule = Callable[[Survey, LaunchPlan], Iterable[Finding]]  # what one thing that can be wrong comes to


def odd_ones(values: Mapping[str, T]) -> tuple[T | None, dict[str, T]]:
    """(what most have, those that have something else, by host); of equally many, what the first has."""
    if not values:
        return None, {}
    # a Counter keeps the order of first sight, and `max` takes the first of equals
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: counts[value])
    return usual, {host: value for host, value in values.items() if value != usual}


def told(survey: Survey, subject: str) -> list[HostReport]:
    """Hosts that have answered about a subject."""
    return [host for host in survey.reached if subject not in (*host.missing, *host.unknown)]


def values_of(by_host: Mapping[str, object]) -> str:
    """`node2 has A, node3 and node4 have B`."""
    hosts: dict[object, list[str]] = {}
    for name, value in by_host.items():
        hosts.setdefault(value, []).append(name)
    return ", ".join(
        f"{listed(names)} {'has' if len(names) == 1 else 'have'} {value}" for value, names in hosts.items()
    )


def listed(names: Iterable[str]) -> str:
    """`A, B and C`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
