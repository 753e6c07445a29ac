"""`mellow-ds launch` on real hosts over real ssh: no fault leaves a process behind.

That it is the same run as on one host is shown in test_pages.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mellow_ds.launcher.wire import SILENCE_SECONDS
from tests.cli.runs import ROOT
from tests.cluster.hosts import INTERFACE, NODES, Hosts, wait_for
from tests.cluster.runs import (
    START_SECONDS,
    WORK,
    all_processes,
    assert_nothing_is_left,
    hold_port,
    launch,
    processes,
    training,
    wrote_steps,
)
from tests.guide import quoted

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_ctrl_c_saves_on_all_hosts(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    words = training(corpus, tmp_path / "run", max_steps=5000, save_every_steps=0)
    with launch(hosts, "--interface", INTERFACE, *words) as launched:
        wait_for(lambda: launched.process.poll() is not None or wrote_steps(tmp_path / "run", 3), START_SECONDS)
        pressed = time.monotonic()
        os.killpg(launched.process.pid, signal.SIGINT)  # what a terminal does
        assert launched.end() == 130, launched.said()[-3000:]
    assert_nothing_is_left(hosts, pressed)
    logs = tmp_path / "run" / "logs"
    assert sorted(file.name for file in logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "on 2 ranks" in (logs / "rank-0.log").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), launched.said()[-3000:]


def test_a_cut_link_in_training(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """Both ranks hang in a collective, whose own time-out is minutes away."""
    words = training(corpus, tmp_path / "run", max_steps=5000, save_every_steps=0)
    with launch(hosts, "--interface", INTERFACE, *words) as launched:
        wait_for(lambda: launched.process.poll() is not None or wrote_steps(tmp_path / "run", 3), START_SECONDS)
        hosts.cut("node2")
        cut = time.monotonic()
        assert launched.end(SILENCE_SECONDS + 45) == 1, launched.said()[-3000:]
        assert "host node2 (rank 1) " + quoted("is lost: ") in launched.last_line
    assert_nothing_is_left(hosts, cut)


def test_a_rank_killed_in_training(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    words = training(corpus, tmp_path / "run", max_steps=5000, save_every_steps=0)
    with launch(hosts, "--interface", INTERFACE, *words) as launched:
        wait_for(lambda: launched.process.poll() is not None or wrote_steps(tmp_path / "run", 3), START_SECONDS)
        killed = time.monotonic()
        for pid in processes(hosts, "node2", "train.py"):
            os.kill(pid, signal.SIGKILL)
        assert launched.end() == 137, launched.said()[-3000:]
        assert launched.last_line.startswith("error: rank 1 on host node2 " + quoted("was ended by SIGKILL (code 137)"))
    assert_nothing_is_left(hosts, killed)


def test_a_launcher_killed_in_training(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    words = training(corpus, tmp_path / "run", max_steps=5000, save_every_steps=0)
    with launch(hosts, "--interface", INTERFACE, *words) as launched:
        wait_for(lambda: launched.process.poll() is not None or wrote_steps(tmp_path / "run", 3), START_SECONDS)
        killed = time.monotonic()
        launched.process.kill()
        assert launched.end() == -signal.SIGKILL
        assert_nothing_is_left(hosts, killed)


@pytest.mark.parametrize("fault", ["link cut", "powered off", "launcher killed", "agent killed", "guard killed"])
def test_ranks_that_ignore_signals_and_their_orphans_are_ended(hosts: Hosts, fault: str) -> None:
    with launch(hosts, "--", WORK, "stubborn") as launched:
        launched.wait_for("at work", 2)
        assert len(processes(hosts, "node2", "work.py stubborn")) == 2  # the rank and its orphan
        began = time.monotonic()
        if fault == "link cut":
            hosts.cut("node2")
        elif fault == "powered off":
            hosts.power_off("node2")
        elif fault == "launcher killed":
            launched.process.kill()
        else:
            guard, agent = sorted(processes(hosts, "node2", "launcher.agent"))
            os.kill(agent if fault == "agent killed" else guard, signal.SIGKILL)
        code = launched.end()
        if fault == "launcher killed":
            assert code == -signal.SIGKILL
        else:
            assert code != 0
            assert launched.last_line.startswith("error: "), launched.said()
            assert "node2" in launched.last_line
        assert_nothing_is_left(hosts, began)


def test_a_stop_leaves_the_jobs_of_others_alone(hosts: Hosts) -> None:
    """A job of another user that looks like ours, and a second run of ours on the same hosts."""
    looks = [sys.executable, "-c", "import time; time.sleep(600)", "mellow_ds.launcher.agent", "work.py", "deepspeed"]
    bystanders = [
        subprocess.Popen(hosts.on(host, ["setpriv", "--reuid=65534", "--clear-groups", *looks])) for host in NODES
    ]
    try:
        with launch(hosts, "--", WORK, "stops", name="second") as second:
            second.wait_for("at work", 2)
            others = frozenset(all_processes(hosts))
            assert len(others) > len(bystanders)
            with launch(hosts, "--", WORK, "stops") as first:
                first.wait_for("at work", 2)
                assert "in use: the ranks meet at" not in first.said()  # nobody listens at it: it stays
                pressed = time.monotonic()
                os.killpg(first.process.pid, signal.SIGINT)
                assert first.end() == 130, first.said()
                assert first.said().count("saved") == 2
                assert_nothing_is_left(hosts, pressed, others)
            os.kill(second.process.pid, signal.SIGTERM)
            assert second.end() == 85, second.said()
        assert_nothing_is_left(hosts, time.monotonic(), frozenset(one.pid for one in bystanders))
    finally:
        for bystander in bystanders:
            bystander.kill()
            bystander.wait()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong host key", "error: host node2: " + quoted("its host key is not the one known for it")),
        ("unresolvable name", "error: host node7: " + quoted("nobody knows this name")),
        ("no such address", "error: host 10.77.0.99: "),
        ("no ssh server", "error: host node2: " + quoted("no ssh server listens there")),
        ("port in use", "error: host node1: port 29500 " + quoted("cannot be used there (Address already in use)")),
        ("no python", "error: host node1: " + quoted("its Python is not there")),
        ("another folder", "error: host node2: "),
    ],
)
def test_what_cannot_start_is_refused_before_a_rank_runs(
    hosts: Hosts, fault: str, message: str, tmp_path: Path
) -> None:
    options: list[object] = []
    folder, script = ROOT, WORK
    holder = None
    if fault == "wrong host key":
        hosts.know("node2", hosts.new_key("another"))
    elif fault == "unresolvable name":
        hosts.hostfile.write_text("node1 slots=1\nnode7 slots=1\n")
    elif fault == "no such address":
        hosts.hostfile.write_text("node1 slots=1\n10.77.0.99 slots=1\n")
    elif fault == "no ssh server":
        for pid in hosts.pids("node2"):
            os.kill(pid, signal.SIGKILL)
    elif fault == "port in use":
        holder = hold_port(hosts, 29500)
        options = ["--master-port", 29500]
    elif fault == "no python":
        options = ["--python", hosts.folder / "python"]
    elif fault == "another folder":
        folder, script = tmp_path / "work", Path(WORK.name)
        folder.mkdir()
        shutil.copy(WORK, folder)
        message += f"{folder / script} is not there: {quoted('the run needs a folder that all hosts see')}"
        hosts.mount("node2", "-t", "tmpfs", "mellow-empty", str(folder))
    try:
        began = time.monotonic()
        with launch(hosts, *options, "--", script, "ends", folder=folder) as launched:
            assert launched.end() == 2, launched.said()
        errors = [line for line in launched.said().splitlines() if line.startswith("error: ")]
        assert errors[0].startswith(message), launched.said()
        assert errors[-1] == launched.last_line
        assert "at work" not in launched.said()
        assert_nothing_is_left(hosts, began, frozenset([holder.pid] if holder else []))
    finally:
        if holder:
            holder.kill()
            holder.wait()


def test_a_port_that_is_taken_by_chance_is_left_for_another(hosts: Hosts) -> None:
    holder = hold_port(hosts, 29500)
    try:
        with launch(hosts, "--", WORK, "ends") as launched:
            assert launched.end() == 0, launched.said()
        assert "mellow-ds launch: port 29500 of node1 is in use: the ranks meet at " in launched.said()
        assert "'MASTER_PORT': '29500'" not in launched.said()
        assert launched.said().count("'MASTER_PORT'") == 2
    finally:
        holder.kill()
        holder.wait()


def test_what_a_rank_gets(hosts: Hosts) -> None:
    """Arguments that a shell would read, variables by the list and by name, a secret not; the same folder."""
    hosts.hostfile.write_text("# two and one\nnode1 slots=2\n\nnode2 slots=1 # the small one\n")
    odd = ["$(touch made-by-a-shell)", "a b", "it's", '"', ";", "*", "--flag=x y", ""]
    with launch(hosts, "--env", "MELLOW_TOLD=a b$c", "--", WORK, "ends", *odd, HF_TOKEN="hidden-value") as launched:
        assert launched.end() == 0, launched.said()
    said = launched.said()
    for place, rank in (("node1", 0), ("node1", 1), ("node2", 2)):
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "3",
                    "LOCAL_WORLD_SIZE": "2" if place == "node1" else "1", "MASTER_ADDR": "node1",
                    "MASTER_PORT": "29500", "MELLOW_TOLD": "a b$c"}  # fmt: skip
        assert f"[{place} rank {rank}] at work {expected} {ROOT} {odd}" in said
    assert not (ROOT / "made-by-a-shell").exists()
    assert "hidden-value" not in said


def test_a_network_that_the_hosts_do_not_share_is_named(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """gloo on loopback: ranks meet, and each then tells the other where on its own host it listens."""
    with launch(hosts, "--interface", "lo", *training(corpus, tmp_path / "run", hang_seconds=10)) as launched:
        assert launched.end(START_SECONDS) == 1, launched.said()[-3000:]
    assert quoted("the ranks cannot connect") in launched.last_line
    assert "with GLOO_SOCKET_IFNAME lo (" in launched.last_line
    assert "name the network that the hosts share, by MELLOW_INTERFACE" in launched.last_line
