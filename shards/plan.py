"""`mellow-shards plan`: how large the shards should be, and whether reading them keeps the GPUs busy."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import EXIT_DONE, PackingError
from shards.command import Commands, add_command

if TYPE_CHECKING:
    from mellow_ds.packing.planning.plan import CorpusSize

_EXAMPLES = """The corpus is given by its numbers, or by a shard folder that is there. Decoding rates are of one core
of an AMD EPYC; --examples-per-cpu-second is for another machine or corpus (benchmarks/plan_check.py measures it).

examples:
  mellow-shards plan --clips 52499 --seconds 11 --questions 18.4 --nodes 2 --gpus 8 --workers 8 --consumes 900
  mellow-shards plan --clips 52499 --seconds 11 --questions 18.4 --gpus 8 --consumes 3900 --codec features --cores 96
  mellow-shards plan shards/train --nodes 4 --gpus 8 --network 500 --cache 200 --consumes 900 --json plan.json"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    summary = "say shard size, time to first batch, disk for caches, and whether the GPUs stay busy"
    parser = add_command(commands, "plan", summary, _EXAMPLES, _run)
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="existing shards, in place of --clips")
    _add_corpus(parser.add_argument_group("corpus"))
    _add_cluster(parser.add_argument_group("cluster"))
    _add_reading(parser.add_argument_group("reading"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")


def _add_corpus(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--clips", type=int, metavar="N", help="different clips")
    group.add_argument("--seconds", type=float, metavar="S", help="mean length of a clip")
    group.add_argument("--questions", type=float, metavar="N", help="questions a clip, on average")
    group.add_argument("--clips-per-question", type=float, metavar="N", help="on average (default: 1.2)")
    group.add_argument("--codec", choices=("flac", "opus", "pcm", "features"), help="(default: flac)")
    group.add_argument("--crops", type=int, default=1, metavar="K", help="with features: stored crops a clip")
    group.add_argument("--shard-megabytes", type=float, default=0, metavar="N", help="(default: chosen)")


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    group.add_argument("--gpus", type=int, default=1, metavar="N", help="a node (default: 1)")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="loader processes a GPU (default: 2)")
    group.add_argument("--cores", type=int, default=0, metavar="N", help="a node (default: as many as are needed)")
    group.add_argument("--disk", type=float, default=1000, metavar="MB/S", help="a node, scattered (default: 1000)")
    group.add_argument(
        "--network", type=float, default=0, metavar="MB/S", help="a node, from remote shards (default: they are local)"
    )
    group.add_argument("--cache", type=float, default=50, metavar="GB", help="a node, for remote shards (default: 50)")
    group.add_argument(
        "--memory", type=float, default=64, metavar="GB", help="a node, for the page cache (default: 64)"
    )


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--consumes", type=float, required=True, metavar="N", help="examples a second that a GPU takes")
    group.add_argument(
        "--examples-per-cpu-second", type=float, default=0, metavar="N", help="of this corpus (default: by codec)"
    )
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="of a micro-batch (default: 4)")
    group.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro-batches a step (default: 1)")
    group.add_argument("--segment-seconds", type=float, default=10, metavar="S", help="of a clip read (default: 10)")
    group.add_argument("--order-runs", type=int, default=64, metavar="N", help="data.order_runs (default: 64)")
    group.add_argument("--shuffle-window", type=int, default=4, metavar="N", help="data.shuffle_window (default: 4)")
    group.add_argument("--grouped", type=int, default=1, metavar="K", help="data.questions_per_clip (default: 1)")
    group.add_argument(
        "--first-batch-seconds", type=float, default=60, metavar="S", help="that remote shards may take (default: 60)"
    )


def _run(options: argparse.Namespace) -> int:
    from mellow_ds.packing.planning.plan import Cluster, Demand, make_plan
    from mellow_ds.packing.planning.report import format_plan, plan_as_json

    corpus, codec = _corpus(options)
    cluster = Cluster(
        nodes=options.nodes,
        gpus=options.gpus,
        workers=options.workers,
        cores=options.cores,
        disk=options.disk,
        network=options.network,
        cache=options.cache,
        memory=options.memory,
    )
    if options.consumes <= 0:
        raise PackingError(f"--consumes is {options.consumes:g}; it must be above 0")
    demand = Demand(
        examples_per_second=options.consumes,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        codec=codec,
        examples_per_cpu_second=options.examples_per_cpu_second,
        segment_seconds=options.segment_seconds,
        order_runs=options.order_runs,
        shuffle_window=options.shuffle_window,
        grouped=options.grouped,
        crops=options.crops,
        shard_megabytes=options.shard_megabytes,
        first_batch_seconds=options.first_batch_seconds,
    )
    plan = make_plan(corpus, cluster, demand)
    if options.json:
        try:
            options.json.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PackingError(f"--json {options.json} cannot be written ({error.strerror})") from None
    print(format_plan(plan))
    return EXIT_DONE


def _corpus(options: argparse.Namespace) -> tuple["CorpusSize", str]:
    """(size, codec) of the corpus that the options name."""
    from mellow_ds.packing.planning.plan import CorpusSize, corpus_of_folder

    numbers = {"--clips": options.clips, "--seconds": options.seconds, "--questions": options.questions}
    if options.folder:
        given = [name for name, value in {**numbers, "--codec": options.codec}.items() if value is not None]
        if given:
            raise PackingError(f"{given[0]} is given beside {options.folder}, which brings its own: drop one of them")
        return corpus_of_folder(options.folder, options.clips_per_question or 0)
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise PackingError(f"{' and '.join(missing)} missing: give the corpus by its numbers, or name a shard folder")
    size = CorpusSize(options.clips, options.seconds, options.questions, options.clips_per_question or 1.2)
    return size, options.codec or "flac"
