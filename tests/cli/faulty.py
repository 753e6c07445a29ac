"""train.py in which rank 1 fails alone: `--fault=PLACE` among its arguments says where.

What other ranks do then depends on where the failing one was, and is real: collectives that nobody answers.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from mellow_ds.cli.train import main as train

MESSAGE = "what is wrong with this rank"


def main(arguments: list[str]) -> int:
    """Train with the fault; returns the exit code."""
    (fault,) = [argument for argument in arguments if argument.startswith("--fault=")]
    if os.environ.get("RANK") == "1":
        FAULTS[fault.removeprefix("--fault=")]()
    return train([argument for argument in arguments if argument != fault])


def in_data() -> None:
    from mellow_ds.data.stream import TrainStream

    fail_at(3, TrainStream, "__next__")


def in_forward() -> None:
    from mellow_ds.model.modeling import MellowForConditionalGeneration

    fail_at(3, MellowForConditionalGeneration, "forward")


def of_memory() -> None:
    """As the allocator of a GPU says it."""
    import torch

    from mellow_ds.model.modeling import MellowForConditionalGeneration

    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
    fail_at(3, MellowForConditionalGeneration, "forward", torch.OutOfMemoryError(words))


def in_optimizer() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    steps: list[int] = []

    def hook(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 2:
            raise ValueError(MESSAGE)

    register_optimizer_step_pre_hook(hook)


def in_save() -> None:
    from mellow_ds.checkpoint.store import CheckpointStore

    fail_at(1, CheckpointStore, "begin")


def and_stay() -> None:
    """Fail, and be kept from ending: no connection breaks, as where GPUs wait for one another."""
    in_forward()
    threading.Thread(target=threading.Event().wait).start()


FAULTS: dict[str, Callable[[], None]] = {
    "data": in_data, "forward": in_forward, "optimizer": in_optimizer, "save": in_save, "stay": and_stay,
    "memory": of_memory,
}  # fmt: skip


def fail_at(call: int, owner: type, name: str, error: Exception | None = None) -> None:
    """Let the given call, from 1, of a method raise."""
    whole = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error or ValueError(MESSAGE)
        return whole(*args, **kwargs)

    setattr(owner, name, failing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
