"""Runs of the real commands: how a tiny one is given, and processes that start in no time.

A command imports torch, transformers and DeepSpeed for 8 seconds of CPU before it does anything. Here every process is
forked from a server that has them, and otherwise stands alone: own environment, own output, own exit code. What is
about a launcher or the interpreter's start is run by the real one (`by_deepspeed`, `by_torchrun`).
"""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [
    "--data.segment_seconds", "0.5", "--model.encoder.channels", "4", "8", "--model.encoder.out_emb", "8",
    "--model.encoder.d_proj", "16", "--model.decoder.hidden_size", "16", "--model.decoder.intermediate_size", "24",
    "--model.decoder.num_hidden_layers", "1", "--model.decoder.num_attention_heads", "2", "--train.num_workers", "0",
    "--train.batch_size", "2", "--train.global_batch_size", "4", "--train.warmup_steps", "2",
    "--train.log_every_steps", "1", "--evaluation.max_new_tokens", "4",
    "--train.save_every_steps", "3", "--train.max_steps", "6",
]  # fmt: skip

_COMMANDS = {"train.py": "mellow_ds.cli.train", "mellow-ds": "mellow_ds.cli.main", "mellow-shards": "shards.cli"}
_COMMANDS["faulty.py"] = "tests.cli.faulty"  # train.py with a fault of the test's choice
_COMMANDS["noting.py"] = "tests.cli.noting"  # train.py that notes its examples
_DROPPED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # a launcher's
_DROPPED |= {"PYTHONDONTWRITEBYTECODE"}  # without bytecode an import of torch and DeepSpeed takes twice the time
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "mellow_ds.cli.training",
        "mellow_ds.cli.evaluation",
        "mellow_ds.cli.model_folder",
        "mellow_ds.engine.deepspeed_engine",
        # what they import late
        "mellow_ds.evaluation.evaluate",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
    ]
)

Done = subprocess.CompletedProcess[str]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, as a person has it who has not started a launcher yet."""
    base = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def by_deepspeed(*arguments: object) -> list[str]:
    """The command line of train.py on two ranks of this host, by DeepSpeed's own launcher."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    return [sys.executable, *launcher, "train.py", *map(str, arguments)]


def by_torchrun(*arguments: object) -> list[str]:
    """The same by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [sys.executable, *launcher, "train.py", *map(str, arguments)]


def launched(command: list[str], seconds: float = 400) -> Done:
    """Run a command line as it is, from the root of the clone, with a deadline."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


class Running:
    """A command in a process of its own: `train.py`, `mellow-ds` or `mellow-shards`, one rank or several."""

    def __init__(
        self, command: str, arguments: Sequence[object], world: dict[str, str], folder: Path, said: Path
    ) -> None:
        """`world`: the variables that a launcher would set; `folder`: where it runs; what it says goes into `said`."""
        self.arguments = [command, *map(str, arguments)]
        self._output, self._errors = (said / f"{name}-{world.get('RANK', 0)}" for name in ("stdout", "stderr"))
        for file in (self._output, self._errors):
            file.touch()
        files = (str(self._output), str(self._errors))
        self._process: ForkServerProcess = _processes.Process(
            target=_be_the_command, args=(self.arguments, environment(**world), folder, files)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process that runs the command."""
        assert self._process.pid is not None
        return self._process.pid

    def said(self) -> str:
        """What it has said on stderr so far."""
        return self._errors.read_text()

    def wait_for(self, found: Callable[[], bool], seconds: float = 200) -> None:
        """Return when `found()` is true; fail where the command ends before."""
        deadline = time.monotonic() + seconds
        while not found():
            assert self._process.is_alive(), self._errors.read_text()[-3000:]
            assert time.monotonic() < deadline, "what was waited for did not come"
            time.sleep(0.1)

    def end(self, deadline: float) -> Done:
        """Wait for it until `deadline`, by the monotonic clock; fail where it is late."""
        self._process.join(max(deadline - time.monotonic(), 0))
        late = self._process.is_alive()
        self.kill()
        done = Done(self.arguments, self._process.exitcode or 0, self._output.read_text(), self._errors.read_text())
        assert not late, f"{self.arguments} did not end in time\n{done.stderr[-3000:]}"
        return done

    def kill(self) -> None:
        """End the process where it has not ended."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def started(command: str, *arguments: object, num_ranks: int = 1, folder: Path = ROOT) -> Iterator[list[Running]]:
    """The processes of a command, one a rank, in `folder`; those that still run in the end are killed."""
    meeting = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as said:
        try:
            for rank in range(num_ranks):
                world = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} if num_ranks > 1 else {}
                running.append(Running(command, arguments, world, folder, Path(said)))
            yield running
        finally:
            for process in running:
                process.kill()


def forked(
    command: str, *arguments: object, num_ranks: int = 1, seconds: float = 300, folder: Path = ROOT
) -> list[Done]:
    """Run a command in `folder` to its end, on one rank or several; what each rank said and its exit code."""
    with started(command, *arguments, num_ranks=num_ranks, folder=folder) as ranks:
        deadline = time.monotonic() + seconds
        return [rank.end(deadline) for rank in ranks]


def _be_the_command(arguments: list[str], env: dict[str, str], folder: Path, files: tuple[str, str]) -> None:
    """In the new process: become what `python train.py ...` would be once it has imported its libraries."""
    for descriptor, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # read from the environment at import, which was the server's
    sys.argv = arguments
    main = importlib.import_module(_COMMANDS[arguments[0]]).main
    sys.exit(main(arguments[1:]))
