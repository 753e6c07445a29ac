"""The hosts of a run: read from a file in DeepSpeed's syntax, and narrowed by its include and exclude filters.

A line a host, `name slots=N`; blank lines and `#` comments are skipped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mellow_ds.errors import ConfigError

# letters, digits, `.`, `-`, `_`; never a `-` first: ssh would read it as an option
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")


@dataclass(frozen=True)
class Host:
    """A host and its slots that the run may use: numbers of GPUs, or places for processes."""

    name: str
    slots: tuple[int, ...]
    is_narrowed: bool = False  # a filter named slots: the ranks see only those GPUs


def check_host_name(name: str, where: str) -> str:
    """`name`, where it can be one of a host: a name of DNS or of the ssh configuration, or an IPv4 address."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: '{name}' is not the name of a host: letters, digits, '.', '-' and '_', beginning and ending "
            "with a letter or digit; users and ports belong into the ssh configuration"
        )
    return name


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order; rank 0 runs on the first."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"the hostfile {path} is not there: write a line a host, such as `node1 slots=4`, or leave out --hostfile "
            "to start on this host"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        host = _read_line(words, f"{path}:{number}")
        if host.name in hosts:
            raise ConfigError(f"{path}:{number}: host {host.name} stands there twice: give it one line with all slots")
        hosts[host.name] = host
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host: write a line a host, such as `node1 slots=4`")
    return list(hosts.values())


def _read_line(words: str, where: str) -> Host:
    match = _LINE.fullmatch(words)
    if match is None:
        raise ConfigError(f"{where}: '{words}' is not `name slots=N`")
    name = check_host_name(match["name"], where)
    if not re.fullmatch(r"[0-9]{1,6}", match["slots"]) or int(match["slots"]) == 0:
        raise ConfigError(
            f"{where}: slots={match['slots']} of host {name} is not a number above 0: give the number of its GPUs, or "
            "put a # before the line"
        )
    return Host(name, tuple(range(int(match["slots"]))))


def filter_hosts(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """The hosts that the filters leave, in the order of `hosts`.

    A filter is `name@name:slot,slot`: hosts between `@`, after a `:` the slots that are meant, all without. One of
    the two may be given.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude exclude one another: give one of the two")
    if include:
        wanted = _read_filter(include, hosts, "--include")
        return [_narrowed(host, wanted[host.name]) for host in hosts if host.name in wanted]
    unwanted = _read_filter(exclude, hosts, "--exclude") if exclude else {}
    left = []
    for host in hosts:
        slots = tuple(slot for slot in host.slots if slot not in unwanted.get(host.name, ()))
        if slots:
            left.append(_narrowed(host, slots))
    if not left:
        raise ConfigError(f"--exclude {exclude} leaves no host")
    return left


def limit_slots(hosts: Sequence[Host], num_per_host: int) -> list[Host]:
    """The hosts with their first `num_per_host` slots each."""
    if num_per_host < 1:
        raise ConfigError(f"--num-per-host is {num_per_host}; it must be above 0")
    for host in hosts:
        if len(host.slots) < num_per_host:
            raise ConfigError(
                f"--num-per-host is {num_per_host}, but host {host.name} has {len(host.slots)} slots: raise its slots "
                "in the hostfile, or start fewer processes"
            )
    return [replace(host, slots=host.slots[:num_per_host]) for host in hosts]


def _narrowed(host: Host, slots: tuple[int, ...]) -> Host:
    return host if slots == host.slots else Host(host.name, slots, is_narrowed=True)


def _read_filter(text: str, hosts: Sequence[Host], option: str) -> dict[str, tuple[int, ...]]:
    """Slots by host name; refuses a host or a slot that the hostfile does not have."""
    by_name = {host.name: host for host in hosts}
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in by_name:
            raise ConfigError(f"{option} names host '{name}', which the hostfile does not have: {', '.join(by_name)}")
        if name in found:
            raise ConfigError(f"{option} names host {name} twice: give all its slots after one ':'")
        found[name] = _read_slots(numbers, by_name[name], option) if colon else by_name[name].slots
    return found


def _read_slots(numbers: str, host: Host, option: str) -> tuple[int, ...]:
    words = [word.strip() for word in numbers.split(",")]
    wrong = [word for word in words if not re.fullmatch(r"[0-9]{1,6}", word) or int(word) not in host.slots]
    if wrong:
        raise ConfigError(
            f"{option} names slot '{wrong[0]}' of host {host.name}, which has slots 0 to {host.slots[-1]}"
        )
    return tuple(sorted({int(word) for word in words}))
