"""Bytes that a rank hands to collectives in an optimizer step, by stage, back end, precision, accumulation and world.

Counted on real processes over gloo and compared with the formula of docs/communication.md. Nothing is timed: the
numbers are the same on any machine.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring

EXAMPLES = """examples:
  python benchmarks/communication.py --out benchmarks/results/communication.json
  python benchmarks/communication.py --tiny --worlds 2        does it run? (a minute)
  unshare -rn sh -c 'ip link set lo up; python benchmarks/communication.py --loopback'     what gloo sends, too
"""
# as ds_configs/zero1.json and zero2.json have it; DeepSpeed's default all-reduces gradients
REDUCED = {"use_multi_rank_bucket_allreduce": False}
# so that a small model is gathered as a large one is: a block is freed after its forward, and gathered again
LIKE_LARGE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
NOT_PERSISTENT = {"stage3_param_persistence_threshold": 0}
MOST_DIFFERENCE = 0.02


def variants() -> list[Any]:
    """Back ends and stages, with accumulation 1 in float32."""
    from mellow_ds.verify.traffic import TrafficCase

    return [
        TrafficCase("ZeRO-0", "deepspeed", 0),
        TrafficCase("ZeRO-1", "deepspeed", 1, REDUCED),
        TrafficCase("ZeRO-1, DeepSpeed's default", "deepspeed", 1, all_reduces=True),
        TrafficCase("ZeRO-2", "deepspeed", 2, REDUCED),
        TrafficCase("ZeRO-2, DeepSpeed's default", "deepspeed", 2, all_reduces=True),
        TrafficCase("ZeRO-3", "deepspeed", 3, LIKE_LARGE),
        TrafficCase("ZeRO-3, below the reuse distance", "deepspeed", 3, NOT_PERSISTENT, gathers=1),
        TrafficCase("ZeRO-3, frozen sharded", "deepspeed", 3, LIKE_LARGE, frozen_whole_megabytes=0),
        TrafficCase("DDP", "fsdp", 0),
        TrafficCase("FSDP2 stage 1", "fsdp", 1),
        TrafficCase("FSDP2 stage 2", "fsdp", 2),
        TrafficCase("FSDP2 stage 3", "fsdp", 3),
        TrafficCase("FSDP2 stage 3, frozen sharded", "fsdp", 3, frozen_whole_megabytes=0),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--worlds", type=measuring.positive, nargs="+", default=[2, 4], help="processes (default 2 4)")
    parser.add_argument("--width", type=measuring.positive, default=384, help="of the decoder (default 384)")
    parser.add_argument(
        "--loopback", action="store_true",
        help="in a network namespace of its own: also the bytes on its loopback, by the kernel's count",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a minute network, accumulation 1 only")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a case and world."""
    from mellow_ds.verify.processes import run_ranks
    from mellow_ds.verify.small import small_model
    from mellow_ds.verify.traffic import Sizes, measure

    width, channels = (64, (4, 8)) if options.tiny else (options.width, (64, 256))
    settings = [(1, "float32"), (2, "float32"), (4, "float32"), (1, "bfloat16")][: 1 if options.tiny else None]
    cases = [
        dataclasses.replace(variant, accumulation=accumulation, precision=precision)
        for variant, (accumulation, precision) in itertools.product(variants(), settings)
    ]
    sizes = Sizes.of(small_model(1, width=width, channels=channels))
    rows = []
    for world in options.worlds:
        print(f"{len(cases)} cases on {world} processes", file=sys.stderr, flush=True)
        found = run_ranks(world, measure, cases, width, channels, seconds=120 + 60 * len(cases))
        for number, case in enumerate(cases):
            by_rank = [ranks[number] for ranks in found]
            mean = sum(one.found for one in by_rank) / world
            rows.append(
                {
                    **dataclasses.asdict(case), "world": world, "trained": sizes.trained, "root": sizes.root,
                    "tied": sizes.tied, "frozen": sizes.frozen, "ring_bytes": mean, "formula": by_rank[0].expected,
                    "difference": mean / by_rank[0].expected - 1,
                    "loopback_bytes": by_rank[0].on_loopback if options.loopback else None,
                    "handed_over_on_rank_0": by_rank[0].by_kind,
                }
            )  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Measured bytes in multiples of P (N - 1) / N, P the trained numbers in float32; the largest difference."""
    lines = []
    for key, group in itertools.groupby(sorted(rows, key=_place(rows)), key=lambda row: _name(row)):
        own = list(group)
        turns = [row["ring_bytes"] / _unit(row) for row in own]
        wanted = own[0]["formula"] / _unit(own[0])
        worst = max((row["difference"] for row in own), key=abs)
        lines.append([*key, _numbers(turns), f"{wanted:.3f}", f"{100 * worst:+.2f} %"])
        if own[0]["loopback_bytes"] is not None:
            lines[-1].append(_numbers(row["loopback_bytes"] / _unit(row) for row in own))
    return lines


def _unit(row: dict[str, Any]) -> float:
    """Bytes of one turn of the trained numbers in float32."""
    return 4 * row["trained"] * (row["world"] - 1) / row["world"]


def _numbers(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["name"], row["precision"], str(row["accumulation"])


def _place(rows: Sequence[dict[str, Any]]) -> Any:
    order = {name: number for number, name in enumerate(dict.fromkeys(_name(row) for row in rows))}
    return lambda row: (order[_name(row)], row["world"])


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 1 where a case is off the formula by more than 2 percent."""
    options = parse_arguments(arguments)
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    rows = measure(options)
    worlds = " / ".join(map(str, options.worlds))
    header = ["back end", "precision", "accumulation", f"counted on {worlds}", "formula", "off by"]
    measuring.print_table([*header, "on the loopback"][: None if options.loopback else -1], table(rows))
    if options.out:
        facts = measuring.context("communication.py", arguments, threads=1)
        facts["versions"]["deepspeed"] = version("deepspeed")
        measuring.write_result(options.out, {"benchmark": "communication", **facts, "rows": rows})
    return int(any(abs(row["difference"]) > MOST_DIFFERENCE for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
