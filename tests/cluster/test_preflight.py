"""`mellow-ds doctor --hostfile` on real hosts: nothing to say where all is well, and every fault found at once."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import ROOT, environment
from tests.cluster.hosts import FRONT, INTERFACE, Hosts
from tests.cluster.runs import (
    START_SECONDS,
    all_processes,
    assert_nothing_is_left,
    environment_file,
    hold_port,
    launch,
    started,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
SECONDS = 150  # for all rounds, one of them held up by a host that hangs
# of a clock that is wrong and a file system that hangs: neither can be had for one host alone
STAND_INS = """
import time
_right = time.time
time.time = lambda: _right() + 90.0
import shutil
_usage = shutil.disk_usage
shutil.disk_usage = lambda path: time.sleep(600) if str(path).endswith("/hanging") else _usage(path)
"""
# one file for all hosts, as it is meant to be used: it looks at which one it is on
ENV_FILE = """
export TMPDIR=$HOSTS_FOLDER/temporary
if ip -brief address | grep -q 10.77.0.2; then
    export PYTHONPATH=$HOSTS_FOLDER/other-packages
    export TMPDIR=$HOSTS_FOLDER/full
fi
"""


def doctor(hosts: Hosts, *words: object) -> "subprocess.CompletedProcess[str]":
    """The command on the front."""
    options = ["--hostfile", hosts.hostfile, "--ssh-config", hosts.ssh_config]
    command = [sys.executable, "-m", "mellow_ds.cli.main", "doctor", *map(str, [*options, *words])]
    return subprocess.run(
        hosts.on(FRONT, command), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )


def found(said: dict[str, Any], code: str) -> list[dict[str, str]]:
    return [finding for finding in said["findings"] if finding["code"] == code]


def test_hosts_that_are_well(hosts: Hosts, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    done = doctor(hosts, "--interface", INTERFACE, "--shared", ROOT, shared, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    for host, address in zip(said["hosts"], ("10.77.0.1", "10.77.0.2"), strict=True):
        assert (host["problem"], host["missing"], host["unknown"]) == ("", [], {})
        assert (host["interface"], host["address"]) == (INTERFACE, address)
        assert host["shares"] == {str(ROOT): True, str(shared): True}
        assert all(one["is_right"] for one in host["neighbours"])
        assert len(host["neighbours"]) == 1
        assert abs(host["clock"]["skew_seconds"]) < 0.5  # one machine has one clock
        assert host["facts"]["python"]["executable"] == sys.executable
        assert host["facts"]["code"]["root"] == str(ROOT)
    assert said["hosts"][1]["meeting"]["peer"] == "10.77.0.1"
    assert [finding for finding in said["findings"] if finding["severity"] == "stops"] == []
    assert list(shared.iterdir()) == []
    assert not list(ROOT.glob(".mellow-preflight*"))
    assert_nothing_is_left(hosts, time.monotonic())

    # the same without --interface: gloo would take loopback, as the host's name means nothing on the network
    done = doctor(hosts)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cure: give --interface e0\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 hosts: 1 thing would stop a run"

    # both are reached from here, and not one from the other
    subprocess.run(hosts.on("node2", ["ip", "route", "add", "blackhole", "10.77.0.1"]), check=True)
    done = doctor(hosts, "--interface", INTERFACE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "  * host node2 cannot connect to node1 at node1: " in done.stdout
    assert done.stdout.splitlines()[-1] == "2 hosts: 1 thing would stop a run"


def test_every_fault_is_found_in_one_go(hosts: Hosts) -> None:
    break_node2(hosts)
    hosts.serve("node2", 2222, "ForceCommand=sleep 600")  # a host that hangs once it is connected to
    with hosts.ssh_config.open("a") as config:
        config.write("Host hangs\n  HostName node2\n  HostKeyAlias node2\n  Port 2222\n")
    hosts.hostfile.write_text("".join(f"{name} slots=1\n" for name in ("node1", "node2", "10.77.0.99", "hangs")))
    holder = hold_port(hosts, 29500)
    options = ["--env-file", hosts.folder / "env.sh", "--python", sys.executable, "--interface", INTERFACE]
    try:
        done = doctor(hosts, *options, "--shared", hosts.folder / "unshared", hosts.folder / "hanging", "--json")
        assert done.returncode == 2, done.stdout + done.stderr
        others = frozenset([holder.pid, *(pid for pid in all_processes(hosts) if "sleep" in command_of(pid))])
        assert_nothing_is_left(hosts, time.monotonic(), others)
    finally:
        holder.kill()
        holder.wait()
    said = json.loads(done.stdout)
    (torch,) = found(said, "package-differs")
    assert torch["severity"] == "stops"
    assert torch["what"].startswith("torch: node2 has 2.10.0; the others have ")
    (code,) = found(said, "code-differs")
    assert f"node2 has {commit(hosts.folder / 'clone')}; the others have {commit(ROOT)}" in code["what"]
    (folder,) = found(said, "folder-not-shared")
    assert folder["what"] == f"node2: {hosts.folder / 'unshared'} is not the one that node1 sees"
    (disk,) = found(said, "disk-full")
    assert disk["what"].startswith(f"host node2: the temporary folder {hosts.folder / 'full'} cannot be written")
    assert "No space left on device" in disk["what"]
    (clock,) = found(said, "clock-off")
    assert clock["what"] == "host node2: its clock is 90.0 s ahead"
    (port,) = found(said, "port-in-use")
    assert port["what"] == "port 29500 of node1 cannot be used: Address already in use"
    gone, hung = found(said, "host-unreachable")
    assert gone["what"].startswith("host 10.77.0.99 cannot be used: ")
    assert "is it switched on, and on this network?" in gone["cure"]
    assert hung["what"] == "host hangs cannot be used: no answer within 15 s"
    (hanging,) = found(said, "host-hangs")
    assert hanging["what"] == f"host node2 has not told about: {hosts.folder / 'hanging'}"
    # and all that can be told of the others is told
    node1, node2, *lost = said["hosts"]
    assert [host["problem"] != "" for host in lost] == [True, True]
    assert node2["meeting"]["is_right"]
    assert node1["shares"] == {str(hosts.folder / name): True for name in ("unshared", "hanging")}
    assert list((hosts.folder / "unshared").iterdir()) == []


def test_what_each_rank_sees_side_by_side(hosts: Hosts) -> None:
    """`launch/check_env.py` in the place of train.py, where node2 has other packages and another number of threads."""
    told = hosts.folder / "other-packages" / "torch-2.10.0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n")
    (hosts.folder / "env.sh").write_text(
        f"if ip -brief address | grep -q 10.77.0.2; then\n    export OMP_NUM_THREADS=7 PYTHONPATH={told.parent}\nfi\n"
    )
    options = ["--env-file", hosts.folder / "env.sh", "--python", sys.executable, "--interface", INTERFACE]
    with launch(hosts, *options, "--", "launch/check_env.py") as launched:
        assert launched.end(START_SECONDS) == 0, launched.said()
    own = "[node1 rank 0] "  # what else is said comes from the hosts' shells
    lines = [line.removeprefix(own) for line in launched.said().splitlines() if line.startswith(own)]
    assert lines[0] == "2 ranks; * differs between them"
    marked = dict(line[2:].split(None, 1) for line in lines if line.startswith("* "))
    assert marked["OMP_NUM_THREADS"] == "0: 1 | 1: 7"
    assert re.fullmatch(r"0: 2\.11\.\S+ \| 1: 2\.10\.0", marked["torch"])
    assert marked.keys() == {"OMP_NUM_THREADS", "torch", "PYTHONPATH"}
    assert "  started by               mellow-ds launch" in lines
    assert "  meets at                 node1:29500" in lines
    assert "  address                  0: 10.77.0.1 | 1: 10.77.0.2" in lines
    assert "  gloo takes               interface e0" in lines


def test_collectives_between_hosts(hosts: Hosts) -> None:
    """`launch/test_distributed.sh`: right values, a table, the link between the hosts, and one line."""
    command = ["bash", "launch/test_distributed.sh", "1", hosts.hostfile, "--ssh-config", hosts.ssh_config,
               "--interface", INTERFACE, "--env-file", environment_file(hosts),
               "--", "--max-megabytes", "1"]  # fmt: skip
    with started(hosts.on(FRONT, list(map(str, command))), hosts.folder / "said", environment()) as launched:
        assert launched.end(START_SECONDS) == 0, launched.said()
    said = launched.said().replace("[node1 rank 0] ", "")
    assert re.search(r"^all_reduce +1048576 +[0-9.]+ +[0-9.]+ +[0-9.]+$", said, re.MULTILINE)
    assert re.search(r"^10\.77\.0\.1 - 10\.77\.0\.2 +[0-9.]+ +[0-9.]+$", said, re.MULTILINE)
    assert re.match(
        r"verdict: (good|right, but uneven): 2 ranks on 2 hosts over gloo \(e0\); all values of \d+ checks right; ",
        said.strip().splitlines()[-1],
    )
    assert_nothing_is_left(hosts, time.monotonic())


def break_node2(hosts: Hosts) -> None:
    """Other packages, another commit, a folder of its own under the shared one's name, a full disk, a wrong clock."""
    for name in ("temporary", "full", "unshared", "hanging", "clone", "other-packages/torch-2.10.0.dist-info"):
        (hosts.folder / name).mkdir(parents=True)
    (hosts.folder / "env.sh").write_text(ENV_FILE.replace("$HOSTS_FOLDER", str(hosts.folder)))
    packages = hosts.folder / "other-packages"
    (packages / "torch-2.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n"
    )
    (packages / "sitecustomize.py").write_text(STAND_INS)
    clone_at_another_commit(hosts.folder / "clone")
    environments = ROOT / ".venv"
    if environments.is_dir():
        hosts.mount("node2", "--bind", str(environments), str(hosts.folder / "clone" / ".venv"))
    hosts.mount("node2", "--rbind", str(hosts.folder / "clone"), str(ROOT))
    hosts.mount("node2", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(hosts.folder / "full"))
    hosts.mount("node2", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(hosts.folder / "unshared"))


def clone_at_another_commit(folder: Path) -> None:
    """A repository with these sources, a line more, and its own history."""
    shutil.copytree(ROOT / "mellow_ds", folder / "mellow_ds", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "mellow_ds" / "trainer.py").open("a") as file:
        file.write("# one commit later\n")
    (folder / ".gitignore").write_text(".venv\n")
    (folder / ".venv").mkdir()
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "another"]):
        subprocess.run(["git", *words], cwd=folder, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})


def commit(folder: Path) -> str:
    """As the table has it."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return told.stdout.strip()[:9]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
