"""Hosts that tell what a test wants them to tell."""

import dataclasses
from typing import Any

from mellow_ds.launcher.plan import HostPlan, LaunchPlan
from mellow_ds.preflight.facts import (
    CodeFacts,
    FolderFacts,
    GpuFacts,
    HostFacts,
    InterfaceFacts,
    LimitFacts,
    MemoryFacts,
    NetworkFacts,
    OpsFacts,
    PythonFacts,
    SystemFacts,
)
from mellow_ds.preflight.survey import Clock, HostReport, Reached, Survey

GIB = 1 << 30
PACKAGES = {
    "torch": "2.11.0",
    "torchaudio": "2.11.0",
    "transformers": "5.23.0",
    "numpy": "2.4.0",
    "soundfile": "0.14.0",
}


def well(number: int, **facts: Any) -> HostReport:
    """Host `node<number>` without a fault; `facts`: subjects that are other ones."""
    address = f"10.0.0.{number}"
    told = HostFacts(
        system=SystemFacts(f"node{number}", f"boot-{number}", "6.1", 1000, 64, 1.0, ("NCCL_DEBUG=WARN",)),
        python=PythonFacts("3.11.7", "/envs/mellow/bin/python", "x86_64", PACKAGES),
        code=CodeFacts("/clone", "0.1.0", "a" * 40, False, "d1"),
        gpus=GpuFacts(("NVIDIA H100",) * 4, "570.1", (80 * GIB,) * 4, (GIB,) * 4),
        memory=MemoryFacts(512 * GIB, 400 * GIB, 64 * GIB),
        network=NetworkFacts((InterfaceFacts("eth0", address, True, 9000, 100_000),), address),
        ops=OpsFacts(("fused_adam",), "", ("c++", "ninja", "nvcc")),
        limits=LimitFacts(65_536, -1, -1),
        folders=(
            FolderFacts("shared", "/shared", "/shared", 900 * GIB),
            FolderFacts("temporary", "/tmp", "/tmp", 90 * GIB),
        ),
    )
    first = Reached("node1", "", True, address, "10.0.0.1")
    return HostReport(
        f"node{number}",
        4,
        clock=Clock(0.001, 0.0005),
        facts=dataclasses.replace(told, **facts),
        shares={"/shared": True},
        meeting=None if number == 1 else first,
        neighbours=() if number == 1 else (first,),
    )


def survey_of(*hosts: HostReport) -> Survey:
    return Survey(hosts, ("/shared",), (), hosts[0].name, {}, hosts[0].name)


def plan_of(survey: Survey, **fields: Any) -> LaunchPlan:
    hosts = tuple(HostPlan(host.name, 4 * place, 4) for place, host in enumerate(survey.hosts))
    return LaunchPlan(**{"hosts": hosts, "command": ("true",), "folder": "/clone", "master_address": "node1", **fields})
