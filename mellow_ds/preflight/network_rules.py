"""What speaks against hosts meeting: the port, the ways between them, interfaces, clocks."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.preflight.compare import Rule, listed, odd_ones, told, values_of
from mellow_ds.preflight.network import is_loopback
from mellow_ds.preflight.survey import HostReport, Survey

_SKEW_SECONDS = 1.0  # between hosts; NTP keeps a hundredth of that


def _clocks(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in survey.reached:
        off = clock_error(host, survey)
        if off:
            way = "ahead" if off > 0 else "behind"
            yield Finding(
                SLOW, "clock-off", f"host {host.name}: its clock is {abs(off):.1f} s {way}",
                "logs of hosts cannot be put in order, and files look older or newer than they are",
                "set it by NTP there: timedatectl set-ntp true, or chronyc makestep",
            )  # fmt: skip


def clock_error(host: HostReport, survey: Survey) -> float:
    """Seconds that a host's clock is ahead of that of most hosts, as far as the round trip lets know; else 0."""
    skews = [one.clock.skew_seconds for one in survey.reached if one.clock is not None]
    if host.clock is None:
        return 0.0
    off = host.clock.skew_seconds - statistics.median_low(skews)
    return off if abs(off) - host.clock.uncertain_seconds > _SKEW_SECONDS else 0.0


def _meeting(survey: Survey, plan: LaunchPlan) -> Iterable[Finding]:
    first = next((host for host in survey.hosts if host.name == survey.meeting_host), None)
    if first is None:
        return
    if first.port_problem:
        where = f"port {plan.master_port} of {first.name} cannot be used: {first.port_problem}"
        if plan.is_port_fixed:
            yield Finding(
                STOPS, "port-in-use", where, "the ranks meet there", "end what listens there (ss -ltnp), or give "
                "another --master-port",
            )  # fmt: skip
        else:
            yield Finding(
                SLOW, "port-in-use", where, "mellow-ds launch takes a free one then; deepspeed, torchrun and srun fail",
                "end what listens there (ss -ltnp), or give another --master-port",
            )  # fmt: skip
    address = plan.master_address if first is survey.hosts[0] else first.name
    for host in survey.reached:
        if host.meeting is None:
            continue
        if host.meeting.why:
            yield Finding(
                STOPS, "meeting-unreachable",
                f"host {host.name} cannot connect to {first.name} at {address}: {host.meeting.why}",
                "ranks meet at the first host, and wait there for those that do not come",
                "open the ports between the hosts in their firewalls, or name an address that all reach: --master-addr",
            )  # fmt: skip
        elif not host.meeting.is_right:
            yield Finding(
                STOPS, "meeting-elsewhere",
                f"host {host.name}: {address} leads to {host.meeting.peer}, which is not {first.name}",
                "its ranks would wait at another host", f"correct /etc/hosts on {host.name}, or give --master-addr",
            )  # fmt: skip


def _neighbours(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in survey.reached:
        lost = [one for one in host.neighbours if one.why or not one.is_right]
        for one in lost:
            yield Finding(
                STOPS, "no-way-between", f"host {host.name} cannot connect to {one.to} ({one.peer or 'its address'}): "
                f"{one.why or 'another host answers there'}", "collectives connect all hosts, at ports of the system's "
                "choice", "open all TCP ports between the hosts in their firewalls",
            )  # fmt: skip


def address_of(host: HostReport, survey: Survey) -> str:
    """The address that collectives should use there: where its connection to the first host begins."""
    if host.meeting is not None and host.meeting.own:
        return host.meeting.own
    if host.name == survey.meeting_host:
        peers = [one.meeting.peer for one in survey.reached if one.meeting is not None and one.meeting.is_right]
        return peers[0] if peers else ""
    return ""


def interface_of(host: HostReport, survey: Survey) -> str:
    """The interface that has that address; empty: unknown."""
    return host.facts.network.name_of(address_of(host, survey))


def _interfaces(survey: Survey, plan: LaunchPlan) -> Iterable[Finding]:
    ways = {host.name: interface_of(host, survey) for host in survey.reached}
    ways = {name: way for name, way in ways.items() if way}
    if plan.interface:
        yield from _chosen_interface(survey, plan.interface, ways)
    elif len(survey.hosts) > 1:
        yield from _gloo(survey, ways)
    mtus = {
        host.name: next((one.mtu for one in host.facts.network.interfaces if one.name == ways.get(host.name)), 0)
        for host in survey.reached
    }
    usual, odd = odd_ones({name: mtu for name, mtu in mtus.items() if mtu})
    if odd:
        yield Finding(
            SLOW, "mtu-differs", f"largest packet of the interface: {values_of(odd)}; the others have {usual}",
            "large packets may be dropped on the way: small messages arrive, large ones hang",
            "set the same MTU on all hosts (ip link set DEVICE mtu N)",
        )  # fmt: skip


def _chosen_interface(survey: Survey, chosen: str, ways: Mapping[str, str]) -> Iterable[Finding]:
    if chosen[0] in "^=":
        return  # NCCL's own ways of choosing
    wanted = tuple(chosen.split(","))
    for host in survey.reached:
        names = {one.name for one in host.facts.network.interfaces if one.is_up}
        if not any(name.startswith(wanted) for name in names):
            yield Finding(
                STOPS, "interface-missing", f"host {host.name}: no interface {chosen} with an address that is up, "
                f"but {', '.join(sorted(names)) or 'none'}", "collectives are bound to it",
                f"give --interface {ways.get(host.name) or 'NAME'}, or for each host its own in --env-file",
            )  # fmt: skip
        elif host.name in ways and not ways[host.name].startswith(wanted):
            yield Finding(
                NOTE, "interface-other", f"host {host.name}: --interface is {chosen}, and the way to the first host is "
                f"{ways[host.name]}", "right where a faster network lies beside it", "see that all hosts reach one "
                "another there: bash launch/test_distributed.sh",
            )  # fmt: skip


def _gloo(survey: Survey, ways: Mapping[str, str]) -> Iterable[Finding]:
    """Without a word gloo takes the address of the host's own name, and NCCL the first interface that it finds."""
    lost = []
    for host in told(survey, "network"):
        is_named = any(line.startswith("GLOO_SOCKET_IFNAME=") for line in host.facts.system.variables)
        if not is_named and is_loopback(host.facts.network.name_address):
            lost.append(host)
    if not lost:
        return
    on_gpus = all(host.facts.gpus.names for host in survey.reached)
    names = sorted(set(ways.values()))
    if len(names) == 1:
        cure = f"give --interface {names[0]}"
    else:
        by_host = ", ".join(f"{name}: {way}" for name, way in ways.items()) or "see ip -brief address"
        cure = f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for each host in --env-file ({by_host})"
    yield Finding(
        NOTE if on_gpus else STOPS, "name-is-loopback",
        f"{listed([host.name for host in lost])}: the host's own name means only itself there "
        f"({lost[0].facts.network.name_address or 'no address'})",
        "gloo takes that address where no interface is named, and other hosts cannot reach it"
        + ("; NCCL, which GPUs use, does not" if on_gpus else ""),
        cure,
    )  # fmt: skip


NETWORK_RULES: Sequence[Rule] = (_meeting, _neighbours, _interfaces, _clocks)
