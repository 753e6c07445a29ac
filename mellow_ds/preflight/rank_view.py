"""What each rank sees, side by side: who started it, which variables it got, where it is, what it would train with.

Run by every rank (`launch/check_env.py`), by whatever launcher, or alone. Where the ranks can meet, rank 0 prints one
table and marks what differs; where they cannot in time, each prints its own. What is wrong with a rank's variables is
told, never raised.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER, MellowError
from mellow_ds.launcher.environment import is_secret
from mellow_ds.option_parser import OptionParser
from mellow_ds.preflight.compare import odd_ones
from mellow_ds.preflight.facts import GpuFacts
from mellow_ds.preflight.look import look_at_gpus, look_at_python
from mellow_ds.preflight.network import address_towards, interfaces, name_address
from mellow_ds.world import World

MEETING_SECONDS = 30.0
_ABSENT = "-"
# of launchers, and what libraries of a run read
_SHOWN = re.compile(
    r"(?:RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|GROUP_RANK|NODE_RANK|CROSS_RANK|CROSS_SIZE|MASTER_ADDR|"
    r"MASTER_PORT|TORCHELASTIC_RUN_ID|TORCHELASTIC_USE_AGENT_STORE|CUDA_VISIBLE_DEVICES|CUDA_HOME|VIRTUAL_ENV|"
    r"CONDA_PREFIX|SLURM_(?:JOB_ID|STEP_ID|PROCID|LOCALID|NODEID|NTASKS|STEP_NUM_TASKS|STEP_TASKS_PER_NODE|STEP_NODELIST|"
    r"JOB_NODELIST|GPUS_ON_NODE|RESTART_COUNT)|OMPI_COMM_WORLD_\w+|PMI_(?:RANK|SIZE|LOCAL_RANK|LOCAL_SIZE)|MPI_LOCAL\w+|"
    r"(?:NCCL|GLOO|OMP|MKL|UCX|TORCH|PYTORCH|MELLOW|HF|DS)_\w+|PYTHONPATH|PYTHONNOUSERSITE|TOKENIZERS_PARALLELISM)"
)
# these are meant to differ between ranks, and are not marked
_OWN = re.compile(
    r"(?:rank|local rank|device|process|RANK|LOCAL_RANK|CROSS_RANK|GROUP_RANK|NODE_RANK|"
    r"SLURM_(?:PROCID|LOCALID|NODEID)|OMPI_COMM_WORLD_(?:RANK|LOCAL_RANK|NODE_RANK)|PMI_(?:RANK|LOCAL_RANK)|MPI_LOCALRANKID|GROUP_WORLD_SIZE)"
)
_OF_A_HOST = ("host", "address", "interfaces")  # differ between hosts, not within one

View = Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, meet, print; code 0: the ranks met, or there is one; 1: they did not; 2: a rank's variables are wrong."""
    options = parse_arguments(sys.argv[1:] if arguments is None else list(arguments))
    world, problem = World(), ""
    try:
        world = World.from_env()
    except MellowError as error:
        problem = str(error)
    own = look(world, problem)
    if problem:
        print("\n".join(table([own])), flush=True)
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return EXIT_USER
    if world.size == 1:
        print("\n".join(table([own])), flush=True)
        return EXIT_DONE
    try:
        views = meet(world, own, options.timeout)
    except (RuntimeError, OSError, MellowError) as error:
        print("\n".join(table([own])), flush=True)
        why = str(error).strip().splitlines()[0]
        print(f"error: rank {world.rank} has not met the others: {why}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    if world.is_main:
        print("\n".join(table(views)), flush=True)
    return EXIT_DONE


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = OptionParser(
        prog="check_env.py", description="Show what each rank of a start sees, side by side; what differs is marked *."
    )
    parser.add_argument(
        "--timeout", type=float, default=MEETING_SECONDS, metavar="SECONDS",
        help="that ranks wait for one another, before each prints its own (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser.parse_args(arguments)


def look(world: World, problem: str = "") -> dict[str, str]:
    """Name -> value of what this rank sees; no torch is imported."""
    python, gpus = look_at_python(), look_at_gpus()
    seen = {
        "started by": problem or world.launcher,
        "rank": f"{world.rank} of {world.size}",
        "local rank": f"{world.local_rank} of {world.local_size}",
        "meets at": _meeting(world),
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "address": _address(world),
        "interfaces": " ".join(f"{one.name}={one.address}" for one in interfaces()) or _ABSENT,
        "gloo takes": _gloo_address(),
        "device": _device(world, gpus),
        "GPUs": f"{len(gpus.names)} x {gpus.names[0]}, driver {gpus.driver}" if gpus.names else "none",
        "cores": str(len(os.sched_getaffinity(0))),
        "folder": str(Path.cwd()),
        "python": f"{python.version} {python.executable}",
        **python.packages,
    }
    for name in sorted(os.environ):
        if _SHOWN.fullmatch(name):
            seen[name] = "(not shown)" if is_secret(name) else os.environ[name]
    return seen


def _meeting(world: World) -> str:
    if world.size == 1:
        return _ABSENT
    try:
        return ":".join(map(str, world.rendezvous(os.environ)))
    except MellowError as error:
        return f"nowhere: {error}"


def _address(world: World) -> str:
    """The address that a connection to the meeting place begins at."""
    if world.size > 1:
        with contextlib.suppress(OSError, MellowError):
            return address_towards(world.rendezvous(os.environ)[0])
    return _ABSENT


def _gloo_address() -> str:
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    return f"interface {named}" if named else name_address() or "loopback"


def _device(world: World, gpus: GpuFacts) -> str:
    """The GPU that the rank would take, by its number among those that it sees."""
    if not gpus.names:
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = len(gpus.names) if visible is None else len([word for word in visible.split(",") if word.strip()])
    try:
        return f"cuda:{world.device_index(number)} of {number}"
    except MellowError as error:
        return f"none: {error}"


def meet(world: World, own: View, timeout_seconds: float) -> list[dict[str, str]]:
    """What every rank sees, on all ranks; raises where they do not meet in time."""
    import torch
    import torch.distributed as dist

    from mellow_ds.engine.process_group import start_process_group, stop_process_group

    start_process_group(world, "gloo", timeout_seconds)
    content = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(content)]))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(content)] = content
    everyone = [torch.zeros_like(padded) for _ in range(world.size)]
    dist.all_gather(everyone, padded)
    stop_process_group()
    return [json.loads(bytes(one[: int(size)].tolist())) for one, size in zip(everyone, sizes, strict=True)]


def table(views: Sequence[View]) -> list[str]:
    """A line a subject, a column a rank; ranks that see the same share a column, and what differs has a `*`."""
    names = list(dict.fromkeys(name for view in views for name in view))
    lines = []
    for name in names:
        values = {str(rank): view.get(name, _ABSENT) for rank, view in enumerate(views)}
        _, odd = odd_ones(values)
        if not odd:
            lines.append(f"  {name:<24} {values['0']}")
            continue
        mark = " " if _OWN.fullmatch(name) or (name in _OF_A_HOST and _differs_by_host(values, views)) else "*"
        lines.append(f"{mark} {name:<24} {_by_rank(values)}")
    title = f"{platform.node()}: one rank" if len(views) == 1 else f"{len(views)} ranks; * differs between them"
    return [title, *lines]


def _differs_by_host(values: Mapping[str, str], views: Sequence[View]) -> bool:
    """Whether ranks of one host agree."""
    by_host: dict[str, set[str]] = {}
    for rank, view in enumerate(views):
        by_host.setdefault(view.get("address", _ABSENT), set()).add(values[str(rank)])
    return all(len(found) == 1 for found in by_host.values())


def _by_rank(values: Mapping[str, str]) -> str:
    """`0-2: A | 3: B`."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(int(rank))
    return " | ".join(f"{_ranges(ranks)}: {value}" for value, ranks in groups.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2,5`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


if __name__ == "__main__":
    sys.exit(main())
