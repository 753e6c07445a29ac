"""Several ranks of one test as real processes over gloo, with a hard deadline."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(num_ranks: int, target: Callable[..., Any], *args: Any, seconds: float = 400) -> None:
    """Call `target(world, *args)` in `num_ranks` processes that form a gloo group; fail where one of them does."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_one_rank, args=(rank, num_ranks, port, errors, target, args))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    codes = [process.exitcode for process in processes]
    assert not messages, "\n".join(messages)
    assert codes == [0] * num_ranks, f"exit codes {codes}"


def _one_rank(rank: int, num_ranks: int, port: int, errors: Any, target: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from mellow_ds.engine.process_group import start_process_group, stop_process_group
        from mellow_ds.world import World

        world = World.from_env()
        start_process_group(world, "gloo")
        target(world, *args)
        stop_process_group()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others are stopped by their deadline or a broken connection
