"""Command lines that start an agent: quoted for the shell that reads them, and ssh's errors in plain words."""

import shlex
import socket
import subprocess

import pytest

from mellow_ds.launcher.hostfile import Host
from mellow_ds.launcher.plan import LaunchPlan, place_ranks
from mellow_ds.launcher.remote import explain, host_command, local_hosts


def planned(**more: str) -> LaunchPlan:
    return LaunchPlan(place_ranks([Host("node1", (0,))]), ("python", "x.py"), "/f", **more)  # type: ignore[arg-type]


def test_a_shell_reads_the_words_that_are_meant() -> None:
    plan = planned(interpreter="/odd path/py'thon;$(reboot)", env_file="/a b/env.sh")
    command = host_command(plan, "node1", is_local=False, ssh_config="/c d")
    assert command[:4] == ["ssh", "-T", "-F", "/c d"]
    assert command[-3:-1] == ["--", "node1"]
    assert {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"} <= set(command)
    first, then = command[-1].split(" && exec ", 1)
    assert first == "cd /"
    assert shlex.split(then) == host_command(plan, "node1", is_local=True)
    shown = ["sh", "-c", f'printf "%s\\n" {then}']
    assert subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines() == shlex.split(then)


def test_this_host_is_known_by_all_its_names() -> None:
    names = ["localhost", "127.0.0.1", socket.gethostname(), "192.0.2.1", "no-such-host.invalid"]
    assert local_hosts(names) == {"localhost", "127.0.0.1", socket.gethostname()}


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        (["", "Host key verification failed.", ""], 255, "its host key is not the one known"),
        (["me@node1: Permission denied (publickey)."], 255, "ssh has no key that it takes"),
        (["ssh: connect to host node1 port 22: Connection timed out"], 255, "it does not answer"),
        (["env: '/x/python': No such file or directory"], 127, "its Python is not there"),
        (["out of luck"], 3, "the connection ended with code 3: out of luck"),
        ([], None, "the connection ended with code None"),
    ],
)
def test_why_a_host_cannot_be_used(said: list[str], code: int | None, expected: str) -> None:
    assert explain(said, code).startswith(expected)
