"""What is known of a host, as it goes over the wire: one dataclass a subject, each found out by itself.

A host may run another commit than the one that asks: fields that it does not know are left as they are here, others are
dropped. Standard library only: it runs on every host before anything is known of that.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SystemFacts:
    """The host and its user."""

    hostname: str = ""
    boot_id: str = ""  # of the kernel's start
    kernel: str = ""
    user_id: int = -1
    cores: int = 0  # that this process may use
    load: float = 0.0  # processes that want to run, mean of a minute
    variables: tuple[str, ...] = ()  # NAME=value of what libraries of a run read, without secrets


@dataclass(frozen=True)
class PythonFacts:
    """The interpreter of the ranks, and what it has."""

    version: str = ""
    executable: str = ""
    machine: str = ""  # such as x86_64
    packages: Mapping[str, str] = field(default_factory=dict)  # version by name; what is not installed is absent


@dataclass(frozen=True)
class CodeFacts:
    """This project, as the ranks would import it."""

    root: str = ""
    version: str = ""
    commit: str = ""  # empty: no clone
    is_dirty: bool = False  # files that git knows are changed
    digest: str = ""  # of all sources


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs that the driver shows."""

    names: tuple[str, ...] = ()
    driver: str = ""
    total_bytes: tuple[int, ...] = ()  # of each; empty where the management library does not answer
    used_bytes: tuple[int, ...] = ()
    infiniband: tuple[str, ...] = ()  # active ports
    problem: str = ""  # why the driver's library does not answer although there is a driver


@dataclass(frozen=True)
class MemoryFacts:
    """Of the host, or of the container that this is."""

    total_bytes: int = 0
    free_bytes: int = 0
    shared_bytes: int = -1  # free in /dev/shm; -1: there is none


@dataclass(frozen=True)
class FolderFacts:
    """A folder that the run writes to or reads from."""

    purpose: str = ""  # "shared", "shards", "temporary", "extensions", "hub"
    path: str = ""
    there: str = ""  # the nearest one that exists
    free_bytes: int = 0
    problem: str = ""  # why nothing can be written there
    digest: str = ""  # of its manifest, where it holds shards


@dataclass(frozen=True)
class InterfaceFacts:
    """A network interface with an address."""

    name: str = ""
    address: str = ""
    is_up: bool = False
    mtu: int = 0
    megabits: int = -1  # a second; -1: unknown


@dataclass(frozen=True)
class NetworkFacts:
    """Interfaces, and what the host's own name means to it."""

    interfaces: tuple[InterfaceFacts, ...] = ()
    name_address: str = ""  # that gloo takes where no interface is named; empty: the name means nothing there

    def name_of(self, address: str) -> str:
        """The interface that has an address; empty: none."""
        return next((one.name for one in self.interfaces if one.address == address), "")


@dataclass(frozen=True)
class OpsFacts:
    """What torch and DeepSpeed have compiled, and could."""

    built: tuple[str, ...] = ()
    stale_lock: str = ""  # what is wrong with one, and the cure
    tools: tuple[str, ...] = ()  # of c++, ninja, nvcc


@dataclass(frozen=True)
class LimitFacts:
    """Soft limits of a process; -1: none."""

    open_files: int = -1
    locked_bytes: int = -1
    processes: int = -1


_KINDS: dict[str, type] = {
    "system": SystemFacts, "python": PythonFacts, "code": CodeFacts, "gpus": GpuFacts, "memory": MemoryFacts,
    "network": NetworkFacts, "ops": OpsFacts, "limits": LimitFacts,
}  # fmt: skip
FOLDER = "folder"  # the subject that there are several of
_PARTS = {"interfaces": InterfaceFacts}  # field -> what its list holds


@dataclass(frozen=True)
class HostFacts:
    """All that a host has told; what it has not is as its kind is by default."""

    system: SystemFacts = field(default_factory=SystemFacts)
    python: PythonFacts = field(default_factory=PythonFacts)
    code: CodeFacts = field(default_factory=CodeFacts)
    gpus: GpuFacts = field(default_factory=GpuFacts)
    memory: MemoryFacts = field(default_factory=MemoryFacts)
    network: NetworkFacts = field(default_factory=NetworkFacts)
    ops: OpsFacts = field(default_factory=OpsFacts)
    limits: LimitFacts = field(default_factory=LimitFacts)
    folders: tuple[FolderFacts, ...] = ()

    def folder(self, purpose: str, path: str = "") -> FolderFacts | None:
        """Of one purpose, and where there are several of it, of one path; None: it has not been told of."""
        return next((one for one in self.folders if one.purpose == purpose and path in ("", one.path)), None)

    def with_subject(self, subject: str, value: object) -> "HostFacts":
        """These, and what a host says of one subject; what is no such thing changes nothing."""
        if not isinstance(value, dict):
            return self
        if subject == FOLDER:
            return dataclasses.replace(self, folders=(*self.folders, _read(FolderFacts, value)))
        if subject not in _KINDS:
            return self
        return dataclasses.replace(self, **{subject: _read(_KINDS[subject], value)})


def as_message(facts: Any) -> dict[str, Any]:
    """A subject for the wire."""
    return dataclasses.asdict(facts)


def _read(kind: type, value: Mapping[str, Any]) -> Any:
    fields = {}
    for one in dataclasses.fields(kind):
        if one.name not in value:
            continue
        found = value[one.name]
        if one.name in _PARTS and isinstance(found, list):
            found = tuple(_read(_PARTS[one.name], part) for part in found if isinstance(part, dict))
        elif isinstance(found, list):
            found = tuple(found)
        fields[one.name] = found
    return kind(**fields)
