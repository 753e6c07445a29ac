"""The process group of a run: made once from the `World`, with a time-out, ended in order."""

import datetime
import os

import torch
import torch.distributed as dist

from mellow_ds.errors import ConfigError, FaultError
from mellow_ds.world import World

TIMEOUT_SECONDS = 600.0  # a rank that waits longer for the others is told so


def start_process_group(world: World, backend: str = "", timeout_seconds: float = TIMEOUT_SECONDS) -> torch.device:
    """Join the run's process group and return this rank's device.

    `timeout_seconds`: of the meeting and of each collective. What names the rank that is behind, the watchdog of
    `mellow_ds.monitor`, has to speak before. Raises `FaultError` where the ranks do not come together.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    use_gpu = torch.cuda.is_available() and backend != "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError("--distributed-backend nccl needs a GPU, and this process sees none: use gloo")
    device = torch.device("cuda", world.device_index(torch.cuda.device_count())) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # ranks of a host share its cores: with all cores for each they wait for one another
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // world.local_size, 1))
    backend = backend or ("nccl" if use_gpu else "gloo")
    if world.size == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        # DeepSpeed reads these even where the group exists already
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        return device
    address, port = world.rendezvous(os.environ)
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(device.index if use_gpu else world.local_rank),  # DeepSpeed takes it for the number of the GPU
        MASTER_ADDR=address, MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    except RuntimeError as error:  # of the store where they meet, or of gloo
        variable = f"{backend.upper()}_SOCKET_IFNAME"
        reason, interface = str(error).partition("\n")[0], os.environ.get(variable)
        raise FaultError(
            f"the ranks cannot connect, meeting at {address}:{port} and with {variable} "
            f"{interface or 'not set'} ({reason}): name the network that the hosts share, by MELLOW_INTERFACE in "
            "launch/env.local.sh or --interface; mellow-ds doctor --hostfile FILE shows which it is"
        ) from error
    return device


def stop_process_group() -> None:
    """Leave the group; ranks leave together, so that none looks failed to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
