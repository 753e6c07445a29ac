"""What the doctor prints of hosts: a line each, what differs marked, then the findings with their cures."""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from mellow_ds.doctor.findings import NOTE, SEVERITIES, SLOW, STOPS, Finding
from mellow_ds.doctor.memory import readable
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.preflight.compare import odd_ones
from mellow_ds.preflight.look import SHARED, TEMPORARY
from mellow_ds.preflight.network_rules import address_of, clock_error, interface_of
from mellow_ds.preflight.rules import commit_of
from mellow_ds.preflight.survey import HostReport, Survey

_TITLES = {STOPS: "WILL NOT WORK", SLOW: "MAY FAIL, OR WILL BE SLOW", NOTE: "TO BE KNOWN"}
_WIDTH = 118
_MARK = "*"
_UNKNOWN = "?"
# columns whose cells should be equal on all hosts
_COMPARED = ("python", "torch", "packages", "commit", "GPUs", "driver", "sees", "interface", "files", "locked")


def format_report(survey: Survey, plan: LaunchPlan, findings: Sequence[Finding]) -> str:
    """The table, what stops first, and a last line that says what it comes to."""
    lines = [*table(survey), ""]
    for severity in SEVERITIES:
        own = [finding for finding in findings if finding.severity == severity]
        if own:
            lines += [_TITLES[severity], ""]
            for finding in own:
                lines += _paragraph(finding)
    return "\n".join([*lines, verdict(survey, plan, findings)])


def verdict(survey: Survey, plan: LaunchPlan, findings: Sequence[Finding]) -> str:
    """One line."""
    stopping = sum(finding.severity == STOPS for finding in findings)
    hosts = f"{len(survey.hosts)} host{'' if len(survey.hosts) == 1 else 's'}"
    if stopping:
        return f"{hosts}: {stopping} thing{'' if stopping == 1 else 's'} would stop a run"
    others = f", {len(findings)} thing{'' if len(findings) == 1 else 's'} to look at" if findings else ""
    named = f" --interface {plan.interface}" if plan.interface else ""
    return f"{hosts}: nothing stops a run{named and f' with{named}'}{others}"


def as_json(survey: Survey, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for programs, with all that the hosts told."""
    hosts = []
    for host in survey.hosts:
        told = dataclasses.asdict(host)
        hosts.append({**told, "address": address_of(host, survey), "interface": interface_of(host, survey)})
    return {"hosts": hosts, "findings": [finding.as_dict() for finding in findings]}


def table(survey: Survey) -> list[str]:
    """A line a host; a cell with a `*` is another one than most hosts have."""
    reached = survey.reached
    cells = {name: [column(host, survey) for host in reached] for name, column in _COLUMNS}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in _COMPARED:
        if name in cells:
            _, odd = odd_ones({host.name: cell for host, cell in zip(reached, cells[name], strict=True)})
            cells[name] = [
                f"{_MARK}{cell or '-'}" if host.name in odd else cell or "-"
                for host, cell in zip(reached, cells[name], strict=True)
            ]
    names = ["host", *(host.name for host in survey.hosts)]
    widths = {name: max(len(name), *map(len, column)) for name, column in cells.items()}
    first = max(map(len, names))
    lines = [_row([f"{'host':<{first}}", *(f"{name:<{widths[name]}}" for name in cells)])]
    rows = iter(zip(*cells.values(), strict=True)) if cells else iter(())
    for host in survey.hosts:
        if host.problem:
            lines.append(f"{host.name:<{first}}  {_MARK}{host.problem}")
        else:
            row = next(rows, ())
            lines.append(_row([f"{host.name:<{first}}", *map(str.ljust, row, widths.values())]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cells).rstrip()


def _packages(host: HostReport, survey: Survey) -> str:
    """How many packages were compared, and how many of them are others than on most hosts."""
    names = sorted({name for one in survey.reached for name in one.facts.python.packages})
    different = sum(
        host.name in odd_ones({one.name: one.facts.python.packages.get(name, "") for one in survey.reached})[1]
        for name in names
    )
    return f"{different} differ" if different else f"{len(names)} same"


def _gpus(host: HostReport, _survey: Survey) -> str:
    names = host.facts.gpus.names
    return f"{len(names)} x {names[0].removeprefix('NVIDIA ')}" if names else "none"


def _memory(host: HostReport, _survey: Survey) -> str:
    memory = host.facts.memory
    return f"{readable(memory.free_bytes)}" if memory.total_bytes else _UNKNOWN


def _free(host: HostReport, purpose: str) -> str:
    free = [one.free_bytes for one in host.facts.folders if one.purpose == purpose]
    return readable(min(free)) if free else _UNKNOWN


def _sees(host: HostReport, survey: Survey) -> str:
    """Whether it shares what it should."""
    if not survey.folders:
        return ""
    lost = sum(not is_seen for is_seen in host.shares.values())
    return "same" if not lost else f"{lost} other{'' if lost == 1 else 's'}"


def _clock(host: HostReport, survey: Survey) -> str:
    """Against the clock here, to the milliseconds that the round trip allows."""
    if host.clock is None:
        return _UNKNOWN
    digits = 3 if host.clock.uncertain_seconds < 0.002 else 2
    return f"{_MARK if clock_error(host, survey) else ''}{host.clock.skew_seconds:+.{digits}f} s"


def _meets(host: HostReport, survey: Survey) -> str:
    """Whether the ranks there reach the first host."""
    if host.name == survey.meeting_host:
        return "port in use" if host.port_problem else "listens"
    if host.meeting is None:
        return _UNKNOWN
    return "reached" if host.meeting.is_right else f"{_MARK}no"


def _interface(host: HostReport, survey: Survey) -> str:
    return interface_of(host, survey)


def _files(host: HostReport, _survey: Survey) -> str:
    return _limit(host.facts.limits.open_files)


def _locked(host: HostReport, _survey: Survey) -> str:
    locked = host.facts.limits.locked_bytes
    return "all" if locked < 0 else readable(locked)


def _limit(number: int) -> str:
    return "no limit" if number < 0 else str(number)


_COLUMNS: Sequence[tuple[str, Callable[[HostReport, Survey], str]]] = (
    ("python", lambda host, _: host.facts.python.version or _UNKNOWN),
    ("torch", lambda host, _: host.facts.python.packages.get("torch", "none")),
    ("packages", _packages),
    ("commit", lambda host, _: commit_of(host)),
    ("GPUs", _gpus),
    ("driver", lambda host, _: host.facts.gpus.driver),
    ("memory", _memory),
    ("disk", lambda host, _: _free(host, SHARED)),
    ("temp", lambda host, _: _free(host, TEMPORARY)),
    ("sees", _sees),
    ("clock", _clock),
    ("meets", _meets),
    ("interface", _interface),
    ("address", address_of),
    ("files", _files),
    ("locked", _locked),
)


def _paragraph(finding: Finding) -> list[str]:
    def wrap(text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(
            text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )

    return [
        *wrap(finding.what, "  * ", "    "),
        *wrap(f"why: {finding.reason}", "    ", "         "),
        *wrap(f"cure: {finding.cure}", "    ", "          "),
        "",
    ]
