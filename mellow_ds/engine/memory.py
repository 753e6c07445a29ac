"""Memory that is used up, on a GPU or a host: said in one line with what to do, in the place of a traceback."""

import contextlib
from collections.abc import Iterator

import torch

from mellow_ds.errors import FaultError

_OF_CPUS = "can't allocate memory"  # of torch's allocator, whose error has no type of its own
_CURE = (
    "take a smaller train.batch_size, which changes nothing else where train.global_batch_size is set, "
    "train.activation_checkpointing, a higher ZeRO stage, or offload (ds_configs/)"
)


@contextlib.contextmanager
def naming_memory() -> Iterator[None]:
    """Within this, `FaultError` is raised where torch finds no memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". GPU")[0].partition("\n")[0].rstrip(".")  # behind it: pages on the allocator
        raise FaultError(f"the GPU has no memory left ({said}): {_CURE}") from error
    except RuntimeError as error:
        if _OF_CPUS not in str(error):
            raise
        said = str(error).rpartition("] ")[2].partition("\n")[0].rstrip(".")
        raise FaultError(f"this host has no memory left ({said}): {_CURE}") from error
