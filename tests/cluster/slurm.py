"""A SLURM cluster on the hosts of a test: slurmctld on `front`, a slurmd on each node, a munged of their own.

Everything lies in the folder of the hosts; the configuration is found by SLURM_CONF, so that a SLURM which this machine
may belong to is neither seen nor touched. The daemons run within the hosts' namespaces and go with them.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.runs import ROOT, environment
from tests.cluster.hosts import FRONT, INTERFACE, NODES, Hosts, hosts_up, wait_for
from tests.cluster.hosts import why_not as why_no_hosts

ADDRESSES = {FRONT: "10.77.0.254", "node1": "10.77.0.1", "node2": "10.77.0.2"}  # those of `Hosts`
CPUS = 8  # that a node says it has: jobs share the cores of this machine
GPUS = 4  # that it says it has: files that jobs are told of as devices
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare")
_UP_SECONDS = 60
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "PREEMPTED")
_CONFIGURATION = """\
ClusterName=mellow
SlurmctldHost={front}({front_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=30
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=02:00:00 OverSubscribe=NO State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty: there can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return why_no_hosts()


class Slurm:
    """The cluster while it is up."""

    def __init__(self, hosts: Hosts) -> None:
        """`hosts`: up already; the cluster lives and dies with them."""
        self.hosts = hosts
        # the path of a socket has 107 characters at most, and those of pytest are long
        self.folder = Path(tempfile.mkdtemp(prefix="mellow-slurm-"))
        self.conf = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Write the configuration, start the daemons, wait for two idle nodes."""
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used; detection needs a mount
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName={name} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n" for name in NODES)
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={ADDRESSES[name]} CPUs={CPUS} RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            for name in NODES
        )
        self.conf.write_text(
            _CONFIGURATION.format(
                front=FRONT, front_address=ADDRESSES[FRONT], folder=self.folder, nodes=nodes, names=",".join(NODES)
            )
        )
        munge = [f"--{name}-file={self.folder / 'munge'}.{name}" for name in ("key", "pid", "seed", "log")]
        self._start(FRONT, "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
        wait_for((self.folder / "munge.socket").exists, _UP_SECONDS, "munged")
        self._start(FRONT, "slurmctld", "-D")
        for name in NODES:
            self._start(name, "slurmd", "-D", "-N", name)
        wait_for(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2", _UP_SECONDS, self._said
        )

    def down(self) -> None:
        """End the daemons, and what they have started."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def environ(self, **more: str) -> dict[str, str]:
        """Of a person at the front: nothing of a job that the tests themselves may run in."""
        plain = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "SBATCH_"))}
        here = {"PATH": _path(), "SLURM_CONF": str(self.conf)}
        return {**plain, **here, "MELLOW_VENV": sys.prefix, "MELLOW_INTERFACE": INTERFACE, **more}

    def run(self, *command: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        """A command at the front, in the root of the clone."""
        return subprocess.run(
            self.hosts.on(FRONT, list(map(str, command))), cwd=ROOT, env=self.environ(**variables),
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def submit(self, *words: object, **variables: str) -> "Job":
        """`sbatch WORDS`, which has to accept them."""
        done = self.run("sbatch", "--parsable", *words, **variables)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip())

    def _start(self, host: str, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{host}.out").open("wb")
        named = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", *command]
        self._daemons.append(
            subprocess.Popen(
                self.hosts.on(host, named), env=self.environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        )

    def _said(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in self.folder.glob("*.out"))


class Job:
    """A job that was submitted."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm = slurm
        self.number = number

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.slurm.run("scontrol", "show", "job", self.number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.fields().get("JobState", "UNKNOWN")

    def wait_for(self, found: Callable[[], object], seconds: float) -> None:
        """Until `found()` is true; fails where it is not within `seconds`, with what is known of the job."""
        deadline = time.monotonic() + seconds
        while not found():
            if time.monotonic() > deadline:
                pytest.fail(f"it did not come in {seconds} s: {self.fields()}\n{self.said()[-4000:]}")
            time.sleep(0.2)

    def said(self) -> str:
        """What is in its log."""
        log = Path(self.fields().get("StdOut", "/dev/null"))
        return log.read_text(errors="replace") if log.is_file() else ""

    def end(self, seconds: float) -> tuple[str, int]:
        """Wait until it has ended: (state, exit code of the batch script)."""
        self.wait_for(lambda: self.state in _ENDED, seconds)
        fields = self.fields()
        return fields["JobState"], int(fields["ExitCode"].split(":")[0])


@contextlib.contextmanager
def slurm_up(folder: Path) -> Iterator[Slurm]:
    """A cluster for as long as the context lasts; nothing of it stays."""
    with hosts_up(folder) as hosts:
        slurm = Slurm(hosts)
        try:
            slurm.up()
            yield slurm
        finally:
            slurm.down()


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"
