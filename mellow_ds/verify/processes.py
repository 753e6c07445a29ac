"""Several ranks as real processes over gloo, with a hard deadline; a fault of a rank is shown.

Each rank is forked from a server that has imported torch and DeepSpeed once (8 seconds of CPU a process otherwise), and
stands alone from then on: own environment, own output.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mellow_ds.errors import FaultError
from mellow_ds.world import World

_SECONDS_AFTER_A_FAULT = 5.0  # that the other ranks get to end by themselves, and to say why
_SAID_LINES = 30  # of a rank's output that a message shows
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "mellow_ds.engine.deepspeed_engine",
        "mellow_ds.engine.fsdp_engine",
        "mellow_ds.checkpoint.store",
        "mellow_ds.verify.small",
        # what they import late
        "transformers.models.llama.modeling_llama",
    ]
)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(num_ranks: int, target: Callable[..., Any], *args: Any, seconds: float = 400) -> list[Any]:
    """Call `target(world, *args)` in `num_ranks` processes that form a gloo group; what each returned, by rank.

    `target` is a function of a module; it returns plain values and numpy arrays, no tensors. Raises `FaultError` with
    the traceback of the ranks that failed, or naming those that are not done after `seconds`; no process is left then.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_Rank(rank, num_ranks, port, Path(folder), target, args) for rank in range(num_ranks)]
        try:
            _wait(ranks, time.monotonic() + seconds)
        finally:
            for rank in ranks:
                rank.kill()
        faults = [rank.fault() for rank in ranks if not rank.is_well]
        if faults:
            raise FaultError("\n".join([f"{len(faults)} of {num_ranks} ranks failed or were not done:", *faults]))
        return [rank.result for rank in ranks]


class _Rank:
    """One process, seen from outside."""

    def __init__(
        self, number: int, num_ranks: int, port: int, folder: Path, target: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        self._number = number
        self._said = folder / f"rank-{number}"
        self._said.touch()
        self.answers, sending = _processes.Pipe(duplex=False)
        self.is_over = False
        self.is_well = False
        self.result: Any = None
        self._trace = ""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        self._process: ForkServerProcess = _processes.Process(
            target=_be_a_rank,
            args=(number, num_ranks, environment, str(Path.cwd()), str(self._said), sending, target, args),
        )
        self._process.start()
        sending.close()  # ours: the pipe ends when the process does

    def take_answer(self) -> None:
        """What the process sent; an end without an answer is a crash."""
        try:
            self.is_well, answer = self.answers.recv()
        except (EOFError, ConnectionError):
            self._process.join(1)
            self.is_well, answer = False, f"ended with code {self._process.exitcode} and without a message"
        self.is_over = True
        if self.is_well:
            self.result = answer
        else:
            self._trace = answer

    def fault(self) -> str:
        """Why it is not well, with the last lines that it said."""
        said = self._said.read_text(encoding="utf-8", errors="replace").splitlines()[-_SAID_LINES:]
        return "\n".join([f"rank {self._number}: {self._trace or 'was not done in time'}", *said])

    def kill(self) -> None:
        """End the process where it has not ended."""
        if self.is_well:
            self._process.join(_SECONDS_AFTER_A_FAULT)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.answers.close()


def _wait(ranks: list[_Rank], deadline: float) -> None:
    """Until all have answered, one has failed, or the time is over."""
    while running := {rank.answers: rank for rank in ranks if not rank.is_over}:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        for ready in wait_for_any(list(running), left):
            assert isinstance(ready, Connection)
            running[ready].take_answer()
            if not running[ready].is_well:
                deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_A_FAULT)


def _be_a_rank(
    rank: int,
    num_ranks: int,
    environment: dict[str, str],
    folder: str,
    said: str,
    answer: Connection,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """In the new process: join the group, run, and send what came of it."""
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        import torch

        from mellow_ds.engine.process_group import start_process_group, stop_process_group

        torch.set_num_threads(1)  # cores are shared by the ranks; read from the environment at the server's import
        world = World(rank, num_ranks, rank, "mellow-ds verify", num_ranks)
        start_process_group(world, "gloo")
        answer.send((True, target(world, *args)))
        stop_process_group()
    except BaseException:
        answer.send((False, traceback.format_exc()))
        os._exit(1)  # at once: the others notice by the broken connection
