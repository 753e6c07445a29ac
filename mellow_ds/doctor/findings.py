"""A finding: what will not work, will be slow, or should be known before a run is started; its reason and its cure."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STOPS = "stops"  # the run will not start, or will break
SLOW = "slow"  # it runs, and wastes time, memory or data
NOTE = "note"  # nothing is wrong; something follows that is easily overlooked
SEVERITIES = (STOPS, SLOW, NOTE)


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    severity: str  # one of SEVERITIES
    code: str  # short name for programs, such as "batch-below-world"
    what: str  # what is the matter, with the keys and numbers that it is about
    reason: str  # why that is so, or what it leads to
    cure: str  # what to do

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """What stops first, then what is slow, then notes; otherwise in the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def stops(findings: Iterable[Finding]) -> bool:
    """Whether any finding stops the run."""
    return any(finding.severity == STOPS for finding in findings)
