"""What speaks against a run on the hosts of a survey: pure functions of what they have told."""

import dataclasses
from collections.abc import Iterable, Sequence

from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding, by_severity
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.preflight.compare import Rule, listed, odd_ones, told, values_of
from mellow_ds.preflight.facts import FOLDER
from mellow_ds.preflight.look import SHARDS, SHARED
from mellow_ds.preflight.machine_rules import MACHINE_RULES
from mellow_ds.preflight.network_rules import NETWORK_RULES
from mellow_ds.preflight.survey import HostReport, Survey

# packages whose versions have to agree, or ranks compute or send different things
_STRICT = ("torch", "deepspeed", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "CUDA of torch", "triton")
_NEEDED = ("torch", "torchaudio", "transformers", "numpy", "soundfile")


def examine(survey: Survey, plan: LaunchPlan) -> list[Finding]:
    """All findings, what stops first."""
    return by_severity(_merged(finding for rule in _RULES for finding in rule(survey, plan)))


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding where several hosts have the same: those that begin with `host NAME: `."""
    merged: dict[Finding, list[str]] = {}
    for finding in findings:
        head, colon, what = finding.what.partition(": ")
        is_of_host = bool(colon) and head.startswith("host ")
        key = dataclasses.replace(finding, what=what) if is_of_host else finding
        merged.setdefault(key, []).extend([head.removeprefix("host ")] if is_of_host else [])
    return [
        dataclasses.replace(key, what=f"host{'s' if len(hosts) > 1 else ''} {listed(hosts)}: {key.what}")
        if hosts
        else key
        for key, hosts in merged.items()
    ]


def _unreachable(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in survey.hosts:
        if host.problem:
            what, _, cure = host.problem.partition(": ")
            yield Finding(
                STOPS, "host-unreachable", f"host {host.name} cannot be used: {what}", "no rank can be started there",
                f"{cure or 'look at it by hand'}; or go on without it: --exclude {host.name}",
            )  # fmt: skip


def _silent(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in survey.reached:
        if host.missing:
            named = ", ".join(name.removeprefix(f"{FOLDER} ").removeprefix(f"{SHARED} ") for name in host.missing)
            yield Finding(
                STOPS, "host-hangs", f"host {host.name} has not told about: {named}",
                "what it looks at there does not answer, and would not answer the ranks: a file system or a driver "
                "that hangs",
                "look with df and dmesg on that host; mount the folder again, or restart the host",
            )  # fmt: skip
        for subject, why in host.unknown.items():
            yield Finding(
                SLOW, "not-looked-at", f"host {host.name} cannot tell about {subject}: {why}",
                "it was not compared", "look at it by hand",
            )  # fmt: skip


def _twice(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    seen: dict[tuple[str, frozenset[str]], str] = {}
    for host in survey.reached:
        addresses = frozenset(one.address for one in host.facts.network.interfaces)
        if not addresses:
            continue
        first = seen.setdefault((host.facts.system.boot_id, addresses), host.name)
        if first != host.name:
            yield Finding(
                STOPS, "host-twice", f"{first} and {host.name} are one and the same host", "it has the same addresses; "
                "its ranks would take the same GPUs twice", "give it one line in the hostfile, with all of its slots",
            )  # fmt: skip


def _users(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    usual, odd = odd_ones({host.name: host.facts.system.user_id for host in told(survey, "system")})
    if odd:
        yield Finding(
            SLOW, "user-differs", f"{values_of(odd)}; on the others the user's number is {usual}",
            "files in the shared folder belong to numbers: what one host writes another may not change",
            "give the user the same number on all hosts",
        )  # fmt: skip


# -- software ---------------------------------------------------------------------------------------------------------


def _pythons(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    hosts = told(survey, "python")
    for what, values in (
        ("Python", {host.name: host.facts.python.version for host in hosts}),
        ("processor kind", {host.name: host.facts.python.machine for host in hosts}),
    ):
        usual, odd = odd_ones(values)
        if odd:
            yield Finding(
                STOPS, "python-differs", f"{what}: {values_of(odd)}; the others have {usual}",
                "ranks of one run must be the same program", "take the same interpreter: --python, or --env-file",
            )  # fmt: skip


def _packages(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    hosts = told(survey, "python")
    for name in sorted({name for host in hosts for name in host.facts.python.packages}):
        usual, odd = odd_ones({host.name: host.facts.python.packages.get(name, "none") for host in hosts})
        if odd:
            yield Finding(
                STOPS if name in _STRICT or "none" in (usual, *odd.values()) else SLOW, "package-differs",
                f"{name}: {values_of(odd)}; the others have {usual}",
                "ranks with different versions compute or send different things: they hang, or learn something wrong",
                f"install the same there, as constraints.txt has it, or run {listed(odd)} with the environment of the "
                "others: --python, or --env-file",
            )  # fmt: skip
    lacking = [name for name in _NEEDED if hosts and all(name not in host.facts.python.packages for host in hosts)]
    if lacking:
        yield Finding(
            STOPS, "package-missing", f"{', '.join(lacking)}: on no host", "train.py needs it",
            f"install it for {hosts[0].facts.python.executable}, or name another interpreter: --python, or --env-file",
        )  # fmt: skip


def _code(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    hosts = {host.name: host for host in told(survey, "code")}
    _, odd = odd_ones({name: host.facts.code.digest for name, host in hosts.items()})
    if not odd:
        return
    usual = next(host for name, host in hosts.items() if name not in odd)
    named = ", ".join(f"{name} has {commit_of(hosts[name])}" for name in odd)
    same_commit = all(hosts[name].facts.code.commit == usual.facts.code.commit for name in odd)
    yield Finding(
        STOPS, "code-differs", f"this project's files: {named}; the others have {commit_of(usual)}"
        f"{', but files that are changed differ' if same_commit else ''}",
        "ranks that run different code hang, or learn something wrong",
        f"bring {usual.facts.code.root} on {listed(odd)} to the same commit (git checkout, git status), or share the "
        "clone",
    )  # fmt: skip


def commit_of(host: HostReport) -> str:
    """Short, with a + where files are changed."""
    code = host.facts.code
    return f"{code.commit[:9] or code.version or 'no clone'}{'+' if code.is_dirty else ''}"


def _variables(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    hosts = told(survey, "system")
    by_host = {host.name: dict(line.split("=", 1) for line in host.facts.system.variables) for host in hosts}
    for name in sorted({name for variables in by_host.values() for name in variables}):
        usual, odd = odd_ones({host: variables.get(name, "(not set)") for host, variables in by_host.items()})
        if odd:
            yield Finding(
                NOTE, "variable-differs", f"{name}: {values_of(odd)}; the others have {usual}",
                "the environment file gives hosts different values: right for names of interfaces, seldom for others",
                "see --env-file",
            )  # fmt: skip


def _shared(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for folder in survey.folders:
        if folder in survey.mark_problems:
            yield Finding(
                STOPS, "shared-not-written",
                f"{survey.marker} cannot write in {folder}: {survey.mark_problems[folder]}",
                "the run keeps its checkpoints and logs there", "give the run's user the right, or name another folder",
            )  # fmt: skip
            continue
        lost = [host.name for host in survey.reached if host.shares.get(folder) is False]
        if lost:
            yield Finding(
                STOPS, "folder-not-shared", f"{listed(lost)}: {folder} is not the one that {survey.marker} sees",
                f"a file that {survey.marker} wrote there is not seen: checkpoints would be scattered over the hosts, "
                "or the folder is not there at all",
                "mount the shared file system there (mount, df), or name a folder that all hosts see: --shared",
            )  # fmt: skip
    for folder in survey.shards:
        yield from _shards(survey, folder)


def _shards(survey: Survey, folder: str) -> Iterable[Finding]:
    """A folder that is only read: the same manifest will do."""
    found = {host.name: host.facts.folder(SHARDS, folder) for host in survey.reached}
    values = {name: one.digest or "none" for name, one in found.items() if one is not None}
    lacking = [name for name, value in values.items() if value == "none"]
    if lacking:
        yield Finding(
            STOPS, "folder-missing", f"{listed(lacking)}: {folder} is not there, or has no manifest",
            "ranks there find no shards", "mount it there, or correct the path",
        )  # fmt: skip
        return
    _, odd = odd_ones(values)
    if odd:
        yield Finding(
            STOPS, "shards-differ", f"{listed(odd)}: the shards in {folder} are others than those of the other hosts",
            "ranks would read different examples under the same number", "copy them anew, or share the folder",
        )  # fmt: skip


_RULES: Sequence[Rule] = (
    _unreachable, _silent, _twice, _pythons, _packages, _code, _shared, *NETWORK_RULES, *MACHINE_RULES, _users,
    _variables,
)  # fmt: skip
