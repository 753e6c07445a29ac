"""A reader of the documentation: at the front of a cluster, in a clone with shards, typing what stands on a page.

What they have of their own goes where the pages say: environment, network and port into `launch/env.local.sh`, users
and keys into the ssh configuration, variables of the plain `deepspeed` command into `.deepspeed_env`. Lines are typed
as they stand but for sizes: a recipe that needs weights from a hub is replaced by the quickstart's, made tiny.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cli.runs import ROOT, TINY
from tests.cluster.hosts import FRONT, INTERFACE
from tests.cluster.runs import START_SECONDS
from tests.cluster.slurm import Slurm
from tests.ranks import free_port

LAST_STEP = "step-000006"  # of a tiny run
_IN_PLACE_OF = {
    "mellow": "quickstart", "digits": "quickstart", "mellow-eval": "quickstart",
    "runs/mine/checkpoints/step-002000": f"runs/mine/checkpoints/{LAST_STEP}",
}  # fmt: skip
# the nodes have eight CPUs and say that they have four GPUs, their partition is `main`, and this machine has two cores
_SMALLER = {
    "--num-per-host 4": "--num-per-host 1", " --gpus-per-node 4": "", "--nproc-per-node 4": "--nproc-per-node 2",
    "--ntasks-per-node=4": "--ntasks-per-node=1",
    "--time=24:00:00": "--time=2:00:00", "--array=0-15": "--array=0-1", "--array=3,7": "--array=0,1",
    "--num-parts 16": "--num-parts 2", "--partition gpu": "--partition main",
}  # fmt: skip
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # as a reader hardly ever is


class Reader:
    """The person, their clone and their place."""

    def __init__(self, slurm: Slurm, corpus: Path, folder: Path) -> None:
        """`corpus`: shards, with the records and audio that they were built from in `corpus` beside them."""
        self.slurm = slurm
        self.folder = folder
        self.runs = folder / "runs"
        _copy_clone(folder)
        for name in ("SHARDS", "shards/test"):
            (folder / name).symlink_to(corpus)
        records = corpus.parent / "corpus"
        (folder / "train.json").symlink_to(records / "train.json")
        (folder / "audio").symlink_to(records)
        (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
        (folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")
        (folder / "launch" / "env.local.sh").write_text(
            f"export MELLOW_VENV={sys.prefix}\nexport MELLOW_INTERFACE={INTERFACE}\n"
            f"export MELLOW_PORT=${{MELLOW_PORT:-{free_port()}}}\n"
        )
        slurm.hosts.let_ssh_reach_nodes()

    def type(self, line: str, *more: object, host: str = FRONT) -> "subprocess.CompletedProcess[str]":
        """Run a line of a page on a host, which has to succeed; `more`: words behind it."""
        process = self.start(line, *more, host=host)
        output, errors = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, f"{line}\n{output[-3000:]}\n{errors[-5000:]}"
        return subprocess.CompletedProcess(process.args, 0, output, errors)

    def start(self, line: str, *more: object, host: str = FRONT) -> "subprocess.Popen[str]":
        """Begin with it."""
        words = [found for word in shlex.split(tiny(line)) for found in self._expand(word)]
        command = self.slurm.hosts.on(host, ["env", *words, *map(str, more)])
        return subprocess.Popen(
            command, cwd=self.folder, env=self._environ(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def forget_runs(self) -> None:
        """Or the next command would find that all is done."""
        shutil.rmtree(self.runs, ignore_errors=True)

    def _expand(self, word: str) -> list[str]:
        """As a shell does it."""
        if "*" not in word:
            return [word]
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(word)) or [word]

    def _environ(self) -> dict[str, str]:
        environ = self.slurm.environ(**_AS_ROOT)
        for name in ("MELLOW_VENV", "MELLOW_INTERFACE", "PYTHONPATH"):
            environ.pop(name, None)
        path = f"{Path(sys.executable).parent}:{environ['PATH']}"
        return {**environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "GLOO_SOCKET_IFNAME": INTERFACE}


def tiny(line: str) -> str:
    """A line of a page at the size of this cluster."""
    for large, small in _SMALLER.items():
        line = line.replace(large, small)
    words = [_IN_PLACE_OF.get(word, word) for word in shlex.split(line)]
    takes_a_model = "--config" in words and "doctor" not in words
    return shlex.join([*words, *(TINY if takes_a_model else [])])


def _copy_clone(folder: Path) -> None:
    """This clone, with a launch/ and a shards/ that can be written into."""
    for path in ROOT.iterdir():
        if path.name in ("launch", "shards"):
            continue
        if not path.name.startswith(".") and path.name not in ("tests", "runs"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("env.local.sh", "__pycache__"))
    (folder / "shards").mkdir()
    for path in (ROOT / "shards").glob("*.py"):
        (folder / "shards" / path.name).symlink_to(path)
