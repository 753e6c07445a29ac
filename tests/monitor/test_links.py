"""Connections to the ranks of other hosts, with processes of their own: who is gone is noticed, who is done is not."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mellow_ds.monitor.heartbeat import make_heartbeats, read_beat
from mellow_ds.monitor.links import Links
from tests.guide import quoted
from tests.ranks import free_port

HOSTS = [7, 8]  # of two ranks
VISITOR = """
import json, sys, time
from mellow_ds.monitor.links import Links

links = Links(1, [7, 8])
links.meet("127.0.0.1", json.loads(sys.argv[1]))
while not links._ranks: time.sleep(0.01)
print("met", flush=True)
sys.stdin.readline()
links.close()
"""
RANK = """
import json, sys, time
from pathlib import Path
from mellow_ds.monitor.links import Links
from mellow_ds.monitor.watchdog import open_heartbeat
from mellow_ds.world import World

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
links = Links(rank, [7, 8])
invitation = folder.parent / "invitation"
if not rank:
    invitation.with_suffix(".new").write_text(json.dumps(links.invitation))
    invitation.with_suffix(".new").rename(invitation)
while not invitation.exists(): time.sleep(0.01)
links.meet("127.0.0.1", json.loads(invitation.read_text()))
heartbeat = open_heartbeat(folder, World(rank, 2, 0, "a test", 1), 600, links)
while not links._ranks: time.sleep(0.01)
heartbeat.at("forward-backward", 7)
time.sleep(60)
"""


@pytest.fixture
def main() -> Iterator[Links]:
    """Rank 0 of two hosts."""
    links = Links(0, HOSTS)
    links.meet("", links.invitation)
    yield links
    links.close()


@pytest.fixture
def visitor(main: Links) -> Iterator["subprocess.Popen[str]"]:
    """Rank 1, which has come to `main`; a line to it, and it is done."""
    process = python(VISITOR, json.dumps(main.invitation), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "met\n"
    soon(lambda: main._ranks)
    yield process
    process.kill()
    process.communicate()


def python(code: str, *words: str, **pipes: int) -> "subprocess.Popen[str]":
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, env=environ, **pipes)


def soon(found: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_rank_is_noticed(main: Links, visitor: "subprocess.Popen[str]") -> None:
    assert main.loss is None
    visitor.kill()
    soon(lambda: main.loss)
    assert main.loss is not None
    assert main.loss[:2] == (1, False)


def test_a_rank_that_is_done_is_none_that_is_lost(main: Links, visitor: "subprocess.Popen[str]") -> None:
    visitor.communicate("done\n")
    soon(lambda: not main._ranks)
    assert main.loss is None


def test_who_does_not_know_the_token_is_sent_away(main: Links) -> None:
    port, token = main.invitation
    for said in (b"GET / HTTP/1.1\r\n\r\n", (token + 1).to_bytes(8, "big") + b"\0\0\0\1", b""):
        stranger = socket.create_connection(("127.0.0.1", port), timeout=10)
        with stranger, contextlib.suppress(OSError):  # it may be sent away before it has spoken
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    other = Links(1, HOSTS)
    other.meet("127.0.0.1", main.invitation)
    soon(lambda: main._ranks)
    soon(lambda: other._ranks)
    with pytest.raises(ConnectionRefusedError):  # all are here
        socket.create_connection(("127.0.0.1", port), timeout=10)
    other.close()
    soon(lambda: main._left)
    assert main.loss is None


def test_on_one_host_nobody_listens() -> None:
    assert Links(0, [7, 7]).invitation[0] == 0
    assert Links().invitation[0] == 0
    assert Links(1, HOSTS).invitation[0] == 0


def test_a_network_that_does_not_let_them_connect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with caplog.at_level(logging.WARNING, "mellow_ds.monitor"):
        Links(1, HOSTS).meet("127.0.0.1", (port, 1))
        soon(lambda: caplog.messages)
    consequence = quoted("where a host is lost, train.hang_seconds alone notices it")
    assert caplog.messages == [f"rank 1 cannot connect to 127.0.0.1:{port} (Connection refused): {consequence}"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_ranks_of_other_hosts_end_with_one_that_was_killed(tmp_path: Path, killed: int) -> None:
    """Under NCCL nothing else would tell them, and `srun` waits for all."""
    folder = tmp_path / "heartbeats"
    make_heartbeats(folder)
    ranks = [python(RANK, str(rank), str(folder), stderr=subprocess.PIPE) for rank in range(2)]
    try:
        soon(lambda: all((beat := read_beat(folder, rank)) is not None and beat.step for rank in range(2)))
        ranks[killed].send_signal(signal.SIGKILL)
        other = ranks[1 - killed]
        _, said = other.communicate(timeout=20)
        assert other.returncode == 1
        assert said.startswith(
            f"error: rank {1 - killed}: ended because rank {killed} failed first: the process (host "
            f"{socket.gethostname()}, pid {ranks[killed].pid}) was killed, last seen in forward-backward of step 7; "
        )
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
