"""Interfaces and addresses, against what `ip` says."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from mellow_ds.preflight.network import address_towards, interfaces, is_loopback, name_address


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_interfaces_are_those_that_ip_lists() -> None:
    shown = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=True).stdout
    expected = {
        (link["ifname"], one["local"], link["mtu"])
        for link in json.loads(shown)
        for one in link["addr_info"]
        if one["scope"] == "global" and not one.get("secondary")
    }
    assert {(one.name, one.address, one.mtu) for one in interfaces()} == expected
    # and the way to each of them begins there
    for one in interfaces():
        assert address_towards(one.address) == one.address


def test_addresses_of_version_6_and_the_state_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "if_inet6").write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe800000000000000000000000000001 02 40 20 80     ib0\n"
        "fd000000000000000000000000000002 02 40 00 80     ib0\n"
    )
    link = tmp_path / "ib0"
    link.mkdir()
    for name, text in (("flags", "0x1003\n"), ("mtu", "4092\n"), ("speed", "200000\n"), ("operstate", "up\n")):
        (link / name).write_text(text)
    (found,) = [one for one in interfaces(tmp_path, tmp_path) if one.name == "ib0"]
    assert (found.address, found.is_up, found.mtu, found.megabits) == ("fd00::2", True, 4092, 200_000)
    (link / "operstate").write_text("down\n")
    assert not next(one for one in interfaces(tmp_path, tmp_path) if one.name == "ib0").is_up


def test_loopback() -> None:
    assert is_loopback("127.0.1.1")
    assert is_loopback("::1")
    assert is_loopback("")
    assert not is_loopback("10.0.0.1")


def test_the_address_of_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that can be bound, as gloo does it; a name that nobody knows gives none."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert name_address() in ("127.0.0.1", "::1")
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.77")  # an address for documents, of no host
    assert name_address() == ""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert name_address() == ""
