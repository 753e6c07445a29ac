"""What a dry run shows: hosts, ranks, commands, and the variables that travel, without the values of secrets."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mellow_ds.launcher.environment import PLACE_VARIABLES, Travelling
from mellow_ds.launcher.plan import LaunchPlan


def describe(plan: LaunchPlan, commands: dict[str, list[str]], log_folder: Path | None) -> list[str]:
    """The lines of a dry run."""
    lines = [
        f"{count(plan.num_ranks, 'rank')} on {count(len(plan.hosts), 'host')}, in {plan.folder}; they meet at "
        f"{_meeting_place(plan)}",
    ]
    for host in plan.hosts:
        devices = f", GPUs {','.join(map(str, host.devices))}" if host.devices else ""
        lines += [f"host {host.name}: ranks {', '.join(map(str, host.ranks))}{devices}"]
        lines += [f"  {shlex.join(commands[host.name])}"]
    lines += [
        "each rank:",
        f"  {shlex.join(plan.command)}",
        "variables of each rank:",
        f"  {' '.join(PLACE_VARIABLES)}",
    ]
    lines += ["variables that travel:", *_or_none(_all_variables(plan).shown())]
    if plan.travelling.withheld:
        named = " ".join(plan.travelling.withheld)
        lines += [f"not sent, secret by name: {named} (send with --env {named})"]
    lines += [f"logs: {log_folder / 'rank-N.log'}" if log_folder else "logs: no files (give --log-dir)"]
    if plan.max_restarts:
        least = count(plan.min_hosts, "host")
        lines += [f"after a lost host: goes on with at least {least}, {plan.max_restarts} times at most"]
    return lines


def _all_variables(plan: LaunchPlan) -> Travelling:
    return Travelling(plan.travelling.allowed, {**plan.travelling.named, **plan.interfaces()})


def count(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _or_none(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines] or ["  none"]


def _meeting_place(plan: LaunchPlan) -> str:
    if not plan.master_port:
        return f"a free port of {plan.master_address}"
    return f"{plan.master_address}:{plan.master_port}{'' if plan.is_port_fixed else ' or a free port'}"
