"""Each rule on made-up hosts: silent where all is well, and one finding with the host's name where it is not."""

import dataclasses
from typing import Any

import pytest

from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.preflight.compare import odd_ones
from mellow_ds.preflight.facts import FolderFacts, GpuFacts, InterfaceFacts, LimitFacts, NetworkFacts, OpsFacts
from mellow_ds.preflight.rules import examine
from mellow_ds.preflight.survey import Clock, HostReport, Reached, Survey
from tests.preflight.made_survey import GIB, PACKAGES, plan_of, survey_of, well


def findings(*hosts: HostReport, plan: dict[str, Any] | None = None, **survey: Any) -> list[Finding]:
    made = dataclasses.replace(survey_of(*hosts), **survey)
    return examine(made, plan_of(made, **(plan or {})))


def changed(host: HostReport, subject: str, **fields: Any) -> HostReport:
    """The host with other fields in one subject."""
    part = dataclasses.replace(getattr(host.facts, subject), **fields)
    return dataclasses.replace(host, facts=dataclasses.replace(host.facts, **{subject: part}))


def test_nothing_is_said_of_hosts_that_are_well() -> None:
    assert findings(well(1), well(2), well(3)) == []
    assert findings(well(1)) == []


def test_who_is_odd() -> None:
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (2, {"a": 1})
    assert odd_ones({"a": 1, "b": 2}) == (1, {"b": 2})  # of equally many the first
    assert odd_ones({"a": 1, "b": 1}) == (1, {})
    assert odd_ones({}) == (None, {})


TEN_GB_IN_USE = GpuFacts(("NVIDIA H100",) * 4, "570.1", (80 * GIB,) * 4, (GIB, 10 * GIB, GIB, 9 * GIB))
FULL = (FolderFacts("temporary", "/tmp", "/tmp", 1 << 20, "No space left on device"),)
LOW = (FolderFacts("shared", "/shared", "/shared", GIB),)


@pytest.mark.parametrize(
    ("subject", "fields", "severity", "code", "words"),
    [
        ("python", {"version": "3.12.1"}, STOPS, "python-differs", "Python: node3 has 3.12.1; the others have 3.11.7"),
        ("python", {"machine": "aarch64"}, STOPS, "python-differs", "node3 has aarch64"),
        ("python", {"packages": {**PACKAGES, "torch": "2.10.0"}}, STOPS, "package-differs",
         "torch: node3 has 2.10.0; the others have 2.11.0"),
        ("python", {"packages": {**PACKAGES, "numpy": "2.2.6"}}, SLOW, "package-differs", "numpy: node3 has 2.2.6"),
        ("python", {"packages": {**PACKAGES, "peft": "0.21"}}, STOPS, "package-differs", "the others have none"),
        ("code", {"commit": "b" * 40, "digest": "d2"}, STOPS, "code-differs",
         "node3 has bbbbbbbbb; the others have aaaaaaaaa"),
        ("code", {"is_dirty": True, "digest": "d2"}, STOPS, "code-differs",
         "node3 has aaaaaaaaa+; the others have aaaaaaaaa, but files that are changed differ"),
        ("gpus", {"names": ("NVIDIA H100",) * 2}, STOPS, "gpus-below-slots", "node3 has 2 GPUs, and 4 slots"),
        ("gpus", {"names": ("NVIDIA A100",) * 4}, SLOW, "gpu-model",
         "GPUs: node3 has NVIDIA A100; the others have NVIDIA H100"),
        ("gpus", {"names": ()}, STOPS, "gpus-on-some", "node3: no GPU, while others have some"),
        ("gpus", {"driver": "560.2"}, SLOW, "gpu-driver-differs", "node3 has 560.2"),
        ("gpus", {"problem": "Driver/library version mismatch"}, STOPS, "gpu-driver", "version mismatch"),
        ("gpus", {"used_bytes": TEN_GB_IN_USE.used_bytes}, SLOW, "gpu-busy", "GPU 1, 3 is in use, up to 10.7 GB"),
        ("memory", {"free_bytes": GIB}, SLOW, "memory-low", "node3: 1.07 GB of 549.8 GB memory is free"),
        ("memory", {"shared_bytes": 64 << 20}, SLOW, "shared-memory-low", "67 MB free in /dev/shm"),
        ("ops", {"stale_lock": "a lock is left: remove it"}, STOPS, "stale-lock", "a lock is left"),
        ("ops", {"tools": ("c++",)}, SLOW, "no-compiler", "ninja, nvcc is not there"),
        ("limits", {"open_files": 1024}, SLOW, "open-files", "may open 1024 files"),
        ("limits", {"processes": 100}, SLOW, "processes", "may have 100 processes"),
        ("system", {"load": 99.0}, SLOW, "host-busy", "99 processes want its 64 cores"),
        ("system", {"user_id": 1001}, SLOW, "user-differs", "node3 has 1001; on the others the user's number is 1000"),
        ("system", {"variables": ("NCCL_DEBUG=INFO",)}, NOTE, "variable-differs", "NCCL_DEBUG: node3 has INFO"),
        ("network", {"interfaces": (InterfaceFacts("eth0", "10.0.0.3", True, 1500),)}, SLOW, "mtu-differs",
         "node3 has 1500; the others have 9000"),
        ("network", {"name_address": "127.0.1.1"}, NOTE, "name-is-loopback", "node3: the host's own name means only"),
    ],
)  # fmt: skip
def test_one_host_is_another(subject: str, fields: dict[str, Any], severity: str, code: str, words: str) -> None:
    found = findings(well(1), well(2), changed(well(3), subject, **fields))
    assert [(one.severity, one.code) for one in found] == [(severity, code)]
    assert words in found[0].what
    assert found[0].reason
    assert found[0].cure


@pytest.mark.parametrize(("folders", "severity", "code"), [(FULL, STOPS, "disk-full"), (LOW, SLOW, "disk-low")])
def test_folders(folders: tuple[FolderFacts, ...], severity: str, code: str) -> None:
    three = dataclasses.replace(well(3), facts=dataclasses.replace(well(3).facts, folders=folders))
    (found,) = findings(well(1), well(2), three)
    assert (found.severity, found.code) == (severity, code)
    assert found.what.startswith(f"host node3: the {folders[0].purpose} folder {folders[0].path}")


@pytest.mark.parametrize(
    ("fields", "severity", "code", "words"),
    [
        ({"problem": "nobody knows this name: check its spelling"}, STOPS, "host-unreachable",
         "host node3 cannot be used: nobody knows this name"),
        ({"missing": ("folder shared /shared", "gpus")}, STOPS, "host-hangs",
         "node3 has not told about: /shared, gpus"),
        ({"unknown": {"gpus": "OSError: x"}}, SLOW, "not-looked-at", "node3 cannot tell about gpus: OSError: x"),
        ({"clock": Clock(-7.5, 0.01)}, SLOW, "clock-off", "host node3: its clock is 7.5 s behind"),
        ({"shares": {"/shared": False}}, STOPS, "folder-not-shared", "node3: /shared is not the one that node1 sees"),
        ({"meeting": Reached("node1", "no answer within 3 s")}, STOPS, "meeting-unreachable",
         "node3 cannot connect to node1 at node1: no answer within 3 s"),
        ({"meeting": Reached("node1", "", False, "10.0.0.3", "10.9.9.9")}, STOPS, "meeting-elsewhere",
         "node1 leads to 10.9.9.9, which is not node1"),
        ({"neighbours": (Reached("node2", "Connection refused", False),)}, STOPS, "no-way-between",
         "node3 cannot connect to node2"),
    ],
)  # fmt: skip
def test_one_host_fails(fields: dict[str, Any], severity: str, code: str, words: str) -> None:
    found = findings(well(1), well(2), dataclasses.replace(well(3), **fields))
    assert [(one.severity, one.code) for one in found] == [(severity, code)]
    assert words in found[0].what


def test_a_clock_is_held_against_the_other_hosts_and_not_against_the_one_here() -> None:
    """Where all are 100 s off, the launcher is."""
    off = [dataclasses.replace(well(n), clock=Clock(100.0, 0.01)) for n in (1, 2, 3)]
    assert findings(*off) == []
    # what the round trip leaves open is no fault
    slow = dataclasses.replace(well(2), clock=Clock(4.0, 3.5))
    assert findings(well(1), slow, well(3)) == []


def test_the_same_fault_of_several_hosts_is_one_finding() -> None:
    few = LimitFacts(1024, -1, -1)
    (found,) = findings(well(1), well(2, limits=few), well(3, limits=few))
    assert found.what == "hosts node2 and node3: a process may open 1024 files"


def test_a_port_in_use_stops_only_where_it_was_asked_for() -> None:
    first = dataclasses.replace(well(1), port_problem="Address already in use")
    for is_fixed, severity in ((True, STOPS), (False, SLOW)):
        (found,) = findings(first, well(2), plan={"is_port_fixed": is_fixed})
        assert (found.severity, found.code) == (severity, "port-in-use")
        assert "port 29500 of node1" in found.what


def test_gloo_on_loopback_stops_a_run_on_cpus_and_its_cure_names_the_interface() -> None:
    network = NetworkFacts((InterfaceFacts("ib0", "10.0.0.2", True, 9000),), "127.0.1.1")
    on_cpus = GpuFacts()
    (found,) = findings(well(1, gpus=on_cpus), well(2, gpus=on_cpus, network=network))
    assert (found.severity, found.code) == (STOPS, "name-is-loopback")
    # the interfaces have different names: one option cannot name both
    assert (
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for each host in --env-file (node1: eth0, node2: ib0)" in found.cure
    )
    # told by --interface, or by the host's own variable: nothing to say
    both = [well(1, gpus=on_cpus), well(2, gpus=on_cpus, network=NetworkFacts(well(2).facts.network.interfaces, ""))]
    assert findings(*both, plan={"interface": "eth0"}) == []
    told = changed(both[1], "system", variables=("GLOO_SOCKET_IFNAME=eth0", "NCCL_DEBUG=WARN"))
    assert [one.code for one in findings(both[0], told)] == ["variable-differs"]


def test_an_interface_that_a_host_has_not() -> None:
    (found,) = findings(well(1), well(2), plan={"interface": "eth1"})
    assert found.what == "hosts node1 and node2: no interface eth1 with an address that is up, but eth0"
    down = changed(well(2), "network", interfaces=(InterfaceFacts("eth0", "10.0.0.2", False, 9000),))
    assert [one.code for one in findings(well(1), down, plan={"interface": "eth0"})] == ["interface-missing"]


def test_one_host_under_two_names() -> None:
    again = dataclasses.replace(well(1), name="alias", meeting=None, neighbours=())
    (found,) = findings(well(1), again)
    assert (found.severity, found.what) == (STOPS, "node1 and alias are one and the same host")


def test_shards_are_told_apart_by_their_manifest() -> None:
    def reads(number: int, digest: str) -> HostReport:
        folder = FolderFacts("shards", "/shards", "/shards", 900 * GIB, "", digest)
        return dataclasses.replace(well(number, folders=(folder,)), shares={})

    survey = {"folders": (), "shards": ("/shards",)}
    assert findings(reads(1, "m"), reads(2, "m"), **survey) == []
    (found,) = findings(reads(1, "m"), reads(2, "m"), reads(3, "n"), **survey)
    assert (found.severity, found.code) == (STOPS, "shards-differ")
    (found,) = findings(reads(1, "m"), reads(2, ""), **survey)
    assert found.what == "node2: /shards is not there, or has no manifest"


def test_a_folder_that_cannot_be_written() -> None:
    (found,) = findings(well(1), well(2), mark_problems={"/shared": "Read-only file system"})
    assert found.what == "node1 cannot write in /shared: Read-only file system"
    assert found.severity == STOPS


def test_a_package_that_no_host_has() -> None:
    packages = {name: version for name, version in PACKAGES.items() if name != "torchaudio"}
    hosts = [changed(well(n), "python", packages=packages) for n in (1, 2)]
    (found,) = findings(*hosts)
    assert found.what == "torchaudio: on no host"
    assert "/envs/mellow/bin/python" in found.cure


def test_what_stops_comes_first() -> None:
    hosts = [well(1), changed(well(2), "limits", open_files=10), dataclasses.replace(well(3), problem="gone: look")]
    assert [one.severity for one in findings(*hosts)] == [STOPS, SLOW]
    assert isinstance(survey_of(*hosts), Survey)


def test_stale_locks_stop_only_where_something_is_compiled() -> None:
    lock = OpsFacts((), "a lock is left: remove it", ("c++",))
    hosts = [well(1, gpus=GpuFacts()), well(2, gpus=GpuFacts(), ops=lock)]
    (found,) = findings(*hosts)
    assert (found.severity, found.code, found.cure) == (SLOW, "stale-lock", "remove it")
