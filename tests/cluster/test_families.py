"""The scripts of launch/ on real hosts: all come to the losses of one host, and DeepSpeed's launcher leaves nothing."""

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from mellow_ds.monitor.endings import first_ending
from tests.cli.runs import ROOT
from tests.cluster.hosts import FRONT, NODES, Hosts, wait_for
from tests.cluster.runs import (
    SECONDS,
    START_SECONDS,
    assert_nothing_is_left,
    losses,
    processes,
    script,
    train_arguments,
    wrote_steps,
)
from tests.guide import quoted
from tests.ranks import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def need_pdsh() -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")


def test_two_hosts_compute_what_one_does(
    hosts: Hosts, corpus: Path, losses_of_one_host: list[float], tmp_path: Path
) -> None:
    """With a run folder whose name a shell, pdsh and DeepSpeed would each change: the longest road of an argument.

    All scripts are run in test_pages.py.
    """
    need_pdsh()
    run = tmp_path / 'a run of $HOME\'s "own" %n; \\ `id`'
    with script(hosts, "deepspeed/pdsh.sh", *train_arguments(corpus, run)) as launched:
        assert launched.end(START_SECONDS) == 0, launched.said()[-3000:]
    assert_nothing_is_left(hosts, time.monotonic())
    assert losses(run) == pytest.approx(losses_of_one_host, rel=1e-6)
    assert "on 2 ranks" in (run / "log.txt").read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This clone as the scripts see it, with a train.py that is quick to start."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "mellow_ds").symlink_to(ROOT / "mellow_ds")
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    shutil.copy(ROOT / "tests" / "cluster" / "stand_in.py", folder / "train.py")
    return folder


def test_what_ends_a_deepspeed_run_ends_its_ranks_and_no_other(hosts: Hosts, clone: Path) -> None:
    """Five runs on the same hosts: Ctrl-C for one, SIGKILL for runner, pdsh and script of others, and of one by mpirun.

    By itself DeepSpeed would `pkill -f` everything that looks like its launcher on Ctrl-C, and forget the ranks else.
    """
    need_pdsh()
    with contextlib.ExitStack() as stack:
        runs, ports = {}, {}
        for name in ("Ctrl-C", "runner", "pdsh", "script"):
            ports[name] = free_port()
            words = ("deepspeed/pdsh.sh", "--config", "quickstart")
            runs[name] = stack.enter_context(script(hosts, *words, root=clone, port=ports[name]))
        words = ("deepspeed/openmpi.sh", "--config", "quickstart")
        runs["mpirun"] = stack.enter_context(script(hosts, *words, root=clone, port=free_port(), **AS_ROOT))
        for run in runs.values():
            run.wait_for("at work", 2)
        with script(hosts, "deepspeed/pdsh.sh", "--config", "quickstart", root=clone, port=ports["script"]) as second:
            assert second.end() == 2  # a stop of this one would have reached both
            assert f"port {ports['script']}, on these hosts: wait for its end, or set MELLOW_PORT" in second.said()
        pressed = time.monotonic()
        os.killpg(runs["Ctrl-C"].process.pid, signal.SIGINT)
        assert runs["Ctrl-C"].end() == 130, runs["Ctrl-C"].said()
        assert runs["Ctrl-C"].said().count("saved") == 2
        wait_for(lambda: not processes(hosts, "node2", f"--master_port={ports['Ctrl-C']} "), SECONDS)
        assert time.monotonic() - pressed < SECONDS
        # 2 ranks each; a stop on its way would be said
        assert sum(len(processes(hosts, host, "train.py --local_rank")) for host in NODES) == 6
        assert not any("saved" in run.said() for name, run in runs.items() if name != "Ctrl-C")
        began = time.monotonic()
        kill(processes(hosts, FRONT, "deepspeed.launcher.runner"), ports["runner"])
        kill(processes(hosts, FRONT, "pdsh -S"), ports["pdsh"])  # and what the runner takes for it
        for name in ("script", "mpirun"):
            runs[name].process.kill()
        assert {name: run.end() for name, run in runs.items() if name != "Ctrl-C"} == {
            "runner": 137, "pdsh": 137, "script": -signal.SIGKILL, "mpirun": -signal.SIGKILL
        }  # fmt: skip
        assert_nothing_is_left(hosts, began)


def test_a_cut_link_ends_training_on_both_sides(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """Of all scripts whose launcher cannot reach the lost host; there the ranks notice it themselves."""
    need_pdsh()
    scripts = ["deepspeed/pdsh.sh", "ssh/pdsh.sh", "deepspeed/openmpi.sh"]
    with contextlib.ExitStack() as stack:
        launched = {}
        for place, name in enumerate(scripts):
            words = train_arguments(corpus, tmp_path / str(place), max_steps=5000, save_every_steps=0)
            launched[name] = stack.enter_context(script(hosts, name, *words, port=free_port(), **AS_ROOT))
        for place, run in enumerate(launched.values()):
            wait_for(
                lambda place=place, run=run: run.process.poll() is not None or wrote_steps(tmp_path / str(place), 3),
                START_SECONDS, run.said,
            )  # fmt: skip
        cut = time.monotonic()
        hosts.cut("node2")
        for name, run in launched.items():
            assert run.end() == 1, (name, run.said()[-3000:])
        assert_nothing_is_left(hosts, cut)
    for place, name in enumerate(scripts[:2]):
        assert launched[name].said().count("error: host node2 is lost: it is off, or its link is cut") == 1
        ending = first_ending(tmp_path / str(place) / "heartbeats")  # either rank says it of the other
        assert ending is not None
        words = quoted("does not answer: it is off, or its link is cut")
        assert (ending.kind, ending.message) == ("lost", f"host {socket.gethostname()} {words}")
    assert "node2" in launched[scripts[2]].said().split("lost communication with a remote daemon")[1]


def test_training_ends_with_the_launcher_of_one_host(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """Its ranks ask for a stop, all agree on it and save."""
    need_pdsh()
    run = tmp_path / "run"
    words = train_arguments(corpus, run, max_steps=5000, save_every_steps=0)
    port = free_port()
    with script(hosts, "deepspeed/pdsh.sh", *words, port=port) as launched:
        wait_for(lambda: launched.process.poll() is not None or wrote_steps(run, 3), START_SECONDS)
        began = time.monotonic()
        kill({pid for pid in processes(hosts, "node2", "deepspeed.launcher.launch") if is_python(pid)}, port)
        assert launched.end() not in (0, 2), launched.said()[-3000:]
        assert_nothing_is_left(hosts, began)
    assert list((run / "checkpoints").glob("step-*")), launched.said()[-3000:]


def kill(pids: set[int], port: int) -> None:
    """SIGKILL to those of the run whose ranks meet at a port."""
    chosen = [pid for pid in pids if re.search(rf"--master_port[= ]{port}\b", command_of(pid))]
    assert chosen
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def is_python(pid: int) -> bool:
    """And no shell that names the same command."""
    return Path(f"/proc/{pid}/exe").readlink().name.startswith("python")
