"""The run folder, held by one run at a time while its ranks leave their heartbeats in it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import EXIT_DONE, FaultError, MellowError
from mellow_ds.monitor.heartbeat import HEARTBEATS_NAME, Heartbeat, make_heartbeats
from mellow_ds.monitor.links import Links
from mellow_ds.monitor.process_id import host_number
from mellow_ds.monitor.run_lock import RunLock
from mellow_ds.monitor.watchdog import open_heartbeat
from mellow_ds.world import World


@contextlib.contextmanager
def held_run_folder(config: RunConfig, world: World, device: torch.device) -> Iterator[Heartbeat]:
    """Hold the run folder of a training, and give this rank's heartbeat (a collective call).

    Rank 0 raises `ConfigError` where another run is in the folder, and `FaultError` where it cannot be made; the other
    ranks then end with its code and without a word. An evaluation reads what a run has saved, and may do so while that
    goes on: its heartbeats have a folder of their own.
    """
    folder = Path(config.save_dir)
    trains = config.mode == "train"
    about = folder if trains else folder / "evaluation" / Path(config.resume_checkpoint).name
    heartbeats = about / HEARTBEATS_NAME
    lock: RunLock | None = None
    refused: MellowError | None = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock.take(folder, world.launch_id) if trains else None
            make_heartbeats(heartbeats)
        except MellowError as error:
            refused = error
        except OSError as error:
            refused = FaultError(f"save_dir {folder} cannot be used ({error.strerror}): choose another one")
    hosts = torch.zeros(world.size, dtype=torch.int64, device=device)
    hosts[world.rank] = host_number()
    dist.all_reduce(hosts)
    links = Links(world.rank, hosts.tolist())
    word = torch.tensor([EXIT_DONE if refused is None else refused.exit_code, *links.invitation], device=device)
    dist.broadcast(word, src=0)
    code, port, token = word.tolist()
    if refused is not None:
        raise refused
    if code != EXIT_DONE:
        sys.exit(code)
    try:
        links.meet(os.environ.get("MASTER_ADDR", ""), (port, token))
        with open_heartbeat(heartbeats, world, config.train.hang_seconds, links) as heartbeat:
            yield heartbeat
    finally:
        if lock is not None:
            lock.release()
