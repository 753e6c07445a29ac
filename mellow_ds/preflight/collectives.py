"""Do the collectives of training give the right values between these ranks, and how fast are they?

    mellow-ds launch --hostfile hosts -- python -m mellow_ds.preflight.collectives

Every rank runs it, by whatever launcher; `launch/test_distributed.sh` starts it. Rank 0 prints a table of latency and
bandwidth and one line that says what it comes to. Code 0: all is right; 1: wrong values, or a rank that did not come to
a collective, each named; 2: a mistake in what was given.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, ConfigError, MellowError, run_command
from mellow_ds.option_parser import OptionParser
from mellow_ds.preflight.network import address_towards, interfaces, is_loopback, name_address
from mellow_ds.world import World

if TYPE_CHECKING:
    import torch

    from mellow_ds.preflight.progress import Progress

_TIMEOUT_SECONDS = 60.0
_BACKEND_LATER_SECONDS = 30.0  # beyond it the back end's own time-out: what is said here is said before
_LOOPBACK = "loopback"
_CASE_SECONDS = 0.2  # of measuring a collective at a size
_KIB, _MIB = 1 << 10, 1 << 20
_SIZES = (8, 64 * _KIB, _MIB, 16 * _MIB, 64 * _MIB, 256 * _MIB)
_MEGABYTES = {"cpu": 16, "cuda": 256}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check as one rank; returns its exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else list(arguments))
    return run_command(lambda: _run(options, World.from_env()))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = OptionParser(
        prog="python -m mellow_ds.preflight.collectives",
        description="Check and measure the collectives that training uses, between the ranks of this start.",
    )
    parser.add_argument("--backend", default="", choices=("", "nccl", "gloo"), help="default: nccl on GPUs, else gloo")
    parser.add_argument(
        "--max-megabytes",
        type=int,
        metavar="N",
        help="largest message that is measured (default: 256 on GPUs, else 16)",
    )
    parser.add_argument("--only-values", action="store_true", help="measure nothing")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_SECONDS, metavar="SECONDS",
        help="that a rank waits for the others (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = parser.parse_args(arguments)
    if options.timeout <= 0 or (options.max_megabytes is not None and options.max_megabytes < 1):
        raise ConfigError("--timeout and --max-megabytes must be above 0")
    return options


def _run(options: argparse.Namespace, world: World) -> int:
    from mellow_ds.engine.process_group import start_process_group, stop_process_group
    from mellow_ds.preflight.nccl_log import read_nccl_log, start_nccl_log
    from mellow_ds.preflight.progress import Progress

    with tempfile.TemporaryDirectory(prefix="mellow-nccl-") as folder:
        log = start_nccl_log(Path(folder))

        def say_last() -> None:
            for warning in read_nccl_log(log).warnings:
                print(f"NCCL: {warning}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)  # the process ends at once

        progress = Progress(world, options.timeout, say_last)
        try:
            progress.at("meeting")
            device = start_process_group(world, options.backend, options.timeout + _BACKEND_LATER_SECONDS)
            progress.connect()
            code = _check(options, world, device, progress, log)
            progress.at("the end")
            stop_process_group()
        except (RuntimeError, OSError, MellowError) as error:  # of torch.distributed, all of them
            progress.fail(_loopback_hint(world) or str(error).strip().splitlines()[0])
        progress.close()
        return code


def _loopback_hint(world: World) -> str:
    """Why ranks of several hosts do not meet over gloo, where that is the reason; empty: it is not."""
    address = _address(world)
    if is_loopback(address) or _bound_interface(world) != _LOOPBACK:
        return ""
    name = next((one.name for one in interfaces() if one.address == address), "NAME")
    return f"gloo took loopback, since this host's name means only itself: give --interface {name} (GLOO_SOCKET_IFNAME)"


def _check(options: argparse.Namespace, world: World, device: "torch.device", progress: "Progress", log: Path) -> int:
    import torch.distributed as dist

    from mellow_ds.preflight.nccl_log import read_nccl_log
    from mellow_ds.preflight.verdict import Outcome, Place, host_names, report

    backend = dist.get_backend()
    wrong, lacking, num_checks = _check_values(world, device, backend, progress)
    nccl = read_nccl_log(log)
    bound = f"{nccl.network} {nccl.devices}".strip() if backend == "nccl" else _bound_interface(world)
    progress.at("gathering what the ranks found")
    of_ranks = _gather(world, {"place": _place(world, bound), "wrong": wrong})
    outcome = Outcome(
        backend=backend,
        places=[Place(**one["place"]) for one in of_ranks],
        num_checks=num_checks,
        wrong={rank: one["wrong"] for rank, one in enumerate(of_ranks) if one["wrong"]},
        lacking=lacking,
    )
    if not options.only_values and world.size > 1:
        from mellow_ds.preflight.bandwidth import measure, measure_links, measure_ranks

        most = (options.max_megabytes or _MEGABYTES[device.type]) * _MIB
        hosts = host_names(outcome.places)
        leaders = [rank for rank, place in enumerate(outcome.places) if place.local_rank == 0]
        measured = measure(world, device, [size for size in _SIZES if size <= most], _CASE_SECONDS, progress.at)
        names = [hosts[rank] for rank in leaders]
        links = measure_links(world, device, leaders, names, progress.at) if len(leaders) > 1 else []
        progress.at("measuring each rank")
        outcome = replace(outcome, measured=measured, links=links, rank_rates=measure_ranks(world, device))
    if world.is_main:
        print("\n".join(report(outcome)), flush=True)
    return EXIT_FAULT if outcome.wrong else EXIT_DONE


def _check_values(
    world: World, device: "torch.device", backend: str, progress: "Progress"
) -> tuple[list[str], dict[str, str], int]:
    """(what is wrong on this rank, checks that the back end has not, number of checks)."""
    from mellow_ds.preflight.checks import Wrong, checks, run_check

    wrong: list[str] = []
    lacking: dict[str, str] = {}
    number = 1  # the barrier below
    for check in checks(world, device, backend):
        number += 1
        progress.at(check.name)
        found = run_check(check, world.rank)
        if isinstance(found, Wrong):
            wrong.append(str(found))
        elif found is not None:
            lacking[check.name] = found
    progress.at("the barrier")
    if not progress.is_barrier_right():
        wrong.append("barrier: a rank passed it before another one had come to it")
    return wrong, lacking, number


def _place(world: World, bound: str) -> dict[str, object]:
    host = socket.gethostname()
    return {"host": host, "address": _address(world), "interface": bound, "local_rank": world.local_rank}


def _address(world: World) -> str:
    """The address of this host that leads to the first rank; empty where there is none."""
    if world.size > 1:
        with contextlib.suppress(OSError):
            return address_towards(world.rendezvous(os.environ)[0])
    return ""


def _bound_interface(world: World) -> str:
    """The interface that gloo takes."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if named or world.size == 1:
        return named
    address = name_address()
    return next((one.name for one in interfaces() if one.address == address), _LOOPBACK)


def _gather(world: World, own: dict[str, object]) -> list[dict]:
    """What every rank brings, in the order of ranks."""
    import torch.distributed as dist

    found: list = [None] * world.size
    dist.all_gather_object(found, json.dumps(own))
    return [json.loads(one) for one in found]


if __name__ == "__main__":
    sys.exit(main())
