"""Runs on the hosts of a test, whatever starts them: what they say, and what they left in folders and on the hosts."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import ROOT, TINY, environment
from tests.cluster.hosts import FRONT, INTERFACE, NODES, Hosts, is_alive
from tests.ranks import free_port

SECONDS = 75  # from a fault to the end of all, and to a host without a process of the run
START_SECONDS = 600  # until ranks that import torch are at work, beside other tests
WORK = ROOT / "tests" / "cluster" / "work.py"


class Launched:
    """A launcher at work, and all that it says."""

    def __init__(self, process: "subprocess.Popen[bytes]", said: Path) -> None:
        self.process = process
        self._said = said

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def wait_for(self, words: str, count: int = 1, seconds: float = START_SECONDS) -> None:
        """Until `words` were said `count` times."""
        deadline = time.monotonic() + seconds
        while self.said().count(words) < count:
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.1)

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit code; fails where it is late."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher has not ended in {seconds} s:\n{self.said()[-3000:]}")

    @property
    def last_line(self) -> str:
        return self.said().strip().splitlines()[-1]


@contextlib.contextmanager
def started(command: Sequence[str], said: Path, environ: Mapping[str, str], folder: Path = ROOT) -> Iterator[Launched]:
    """A command in a process group of its own, as under a terminal; its words go into the file `said`."""
    with said.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield Launched(process, said)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def launch(
    hosts: Hosts, *words: object, name: str = "said", folder: Path = ROOT, **variables: str
) -> Iterator[Launched]:
    """`mellow-ds launch` on the front, in `folder`."""
    options = ["--hostfile", hosts.hostfile, "--ssh-config", hosts.ssh_config]
    command = [sys.executable, "-m", "mellow_ds.cli.main", "launch", *map(str, [*options, *words])]
    with started(hosts.on(FRONT, command), hosts.folder / name, environment(**variables), folder) as launched:
        yield launched


def train_arguments(corpus: Path, run: Path, **train: object) -> list[str]:
    """For train.py: a model of a few hundred weights, four examples a step, six steps."""
    more = [word for key, value in train.items() for word in (f"--train.{key}", str(value))]
    return ["--config", "quickstart", "--deepspeed_config", "ds_configs/zero2.json",
            "--data.shards", str(corpus), "--save-dir", str(run), *TINY, *more]  # fmt: skip


def training(corpus: Path, run: Path, **train: object) -> list[str]:
    """What stands behind the options of `mellow-ds launch`."""
    return ["--", "train.py", *train_arguments(corpus, run, **train)]


def processes(hosts: Hosts, host: str, words: str = "") -> set[int]:
    """Processes of a host, its ssh server's aside; those whose command line has `words`."""
    found = set()
    for pid in hosts.pids(host):
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{pid}/exe").readlink().name
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if program.split()[0] != "sshd" and words in line:
                found.add(pid)
    return found


def all_processes(hosts: Hosts) -> set[int]:
    return {pid for host in (FRONT, *NODES) for pid in processes(hosts, host)}


def assert_nothing_is_left(hosts: Hosts, since: float, others: frozenset[int] = frozenset()) -> None:
    """No process but those of others `SECONDS` after a fault."""
    left = SECONDS - (time.monotonic() - since)
    deadline = time.monotonic() + max(left, 0)
    while alive := all_processes(hosts) - others:
        assert time.monotonic() < deadline, subprocess.run(
            ["ps", "-o", "pid,ppid,stat,cmd", "-p", ",".join(map(str, alive))], capture_output=True, text=True
        ).stdout
        time.sleep(0.1)
    assert all(is_alive(pid) for pid in others)


def wrote_steps(run: Path, count: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and len(read_metrics(path)) >= count


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def hold_port(hosts: Hosts, port: int) -> "subprocess.Popen[bytes]":
    """A process on node1 that listens."""
    code = f"import socket, time; s = socket.create_server(('', {port})); print('up', flush=True); time.sleep(600)"
    holder = subprocess.Popen(hosts.on("node1", [sys.executable, "-c", code]), stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def environment_file(hosts: Hosts, root: Path = ROOT) -> Path:
    """What the scripts of launch/ get as --env-file: the environment of the tests, and the interface of the hosts."""
    path = hosts.folder / "env.sh"
    path.write_text(f"MELLOW_VENV={sys.prefix}\nMELLOW_INTERFACE={INTERFACE}\nsource '{root}/launch/env.sh'\n")
    return path


@contextlib.contextmanager
def script(
    hosts: Hosts, name: str, *words: object, root: Path = ROOT, port: int = 0, **variables: str
) -> Iterator[Launched]:
    """A script of launch/ on the front, in the clone `root`; its ranks meet at a port that no other test uses."""
    port = port or free_port()
    options = ["--hostfile", hosts.hostfile, "--env-file", environment_file(hosts, root), *words]
    command = hosts.on(FRONT, [str(root / "launch" / name), *map(str, options)])
    environ = environment(MELLOW_SSH_CONFIG=str(hosts.ssh_config), MELLOW_PORT=str(port), **variables)
    with started(command, hosts.folder / f"said-{port}", environ, root) as launched:
        yield launched
