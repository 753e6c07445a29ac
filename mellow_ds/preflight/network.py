"""A host's network: its interfaces, which of them leads to another host, and which one gloo takes unasked.

Standard library only: it runs on every host before anything is known of that.
"""

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from mellow_ds.preflight.facts import InterfaceFacts

_SIOCGIFADDR = 0x8915  # from linux/sockios.h: the IPv4 address of an interface
_NAME_BYTES = 15  # of an interface, from linux/if.h
_IFF_UP = 0x1
_ANY_PORT = 9


def interfaces(sys_net: Path = Path("/sys/class/net"), proc_net: Path = Path("/proc/net")) -> list[InterfaceFacts]:
    """Every address of this host with its interface, loopback and link-local ones left out."""
    found = []
    for _, name in socket.if_nameindex():
        address = _ipv4(name)
        if address:
            found.append(_interface(name, address, sys_net))
    for name, address in _ipv6(proc_net / "if_inet6"):
        found.append(_interface(name, address, sys_net))
    return [one for one in found if not _is_useless(one.address)]


def address_towards(host: str, port: int = _ANY_PORT) -> str:
    """The address of this host that a connection to `host` begins at; raises `OSError` where there is no way."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    raise OSError(f"{host} has no address")


def name_address() -> str:
    """The address that gloo takes where no interface is named: the first of this host's name that is its own.

    Empty where there is none: gloo then takes loopback, and only ranks of one host meet.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return str(address[0])
    return ""


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the host itself, or to none."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return True


def _ipv4(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:_NAME_BYTES])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _ipv6(path: Path) -> list[tuple[str, str]]:
    """(interface, address) by proc(5): address, index, prefix, scope, flags, name."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    return [
        (fields[5], str(ipaddress.IPv6Address(bytes.fromhex(fields[0]))))
        for fields in map(str.split, lines)
        if len(fields) == 6
    ]


def _interface(name: str, address: str, sys_net: Path) -> InterfaceFacts:
    return InterfaceFacts(
        name=name,
        address=address,
        is_up=_number(sys_net / name / "flags") & _IFF_UP != 0 and _carries(sys_net / name),
        mtu=_number(sys_net / name / "mtu"),
        megabits=_number(sys_net / name / "speed", -1),
    )


def _carries(folder: Path) -> bool:
    """Whether its link is there; a kind of interface that has no link says `unknown`."""
    try:
        return (folder / "operstate").read_text(encoding="ascii").strip() in ("up", "unknown")
    except OSError:
        return True


def _number(path: Path, default: int = 0) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip(), 0)
    except (OSError, ValueError):
        return default


def _is_useless(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_loopback or found.is_link_local
