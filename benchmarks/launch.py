"""From `mellow-ds launch` to the first training step, on two hosts and on one; and how soon a dry run answers.

The hosts are network namespaces of this machine with an ssh server each (tests/cluster/hosts.py; as root): two ranks
with a model of a few hundred weights, on one host or one on each, over real ssh and the namespaces' own network. What a
start does, most of it importing torch, is the same; what is compared is what a second host adds.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring

sys.path.insert(0, str(measuring.ROOT))

from tests.cli.runs import environment
from tests.cluster.hosts import FRONT, INTERFACE, NODES, Hosts, hosts_up, why_not
from tests.cluster.runs import train_arguments, wrote_steps

ONE, TWO, DRY = "one host", "two hosts", "dry run"
_START_SECONDS = 300.0
_POLL_SECONDS = 0.02
EXAMPLES = """examples:
  python benchmarks/launch.py --out benchmarks/results/launch.json
  python benchmarks/launch.py --rounds 1          does it run? (a minute)
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=measuring.positive, default=3, help="rounds (default 3)")
    return parser.parse_args(arguments)


class Starts:
    """Starts of a run on hosts that are up."""

    def __init__(self, hosts: Hosts, corpus: Path, folder: Path) -> None:
        """`corpus`: shards; `folder`: for runs."""
        self._hosts, self._corpus, self._folder = hosts, corpus, folder

    def first_step(self, layout: Sequence[int], number: int) -> float:
        """Seconds from the command to the record of the first step; `layout`: slots of each host."""
        run = self._folder / f"run-{len(layout)}-{number}"
        process = self._launch(layout, run)
        start = time.perf_counter()
        try:
            while not wrote_steps(run, 1):
                if process.poll() is not None or time.perf_counter() - start > _START_SECONDS:
                    raise SystemExit(f"no step was made: see {self._folder / 'said'}")
                time.sleep(_POLL_SECONDS)
            seconds = time.perf_counter() - start
            process.send_signal(signal.SIGTERM)
            process.wait(_START_SECONDS)
        finally:
            process.kill()
        return seconds

    def dry_run(self, _number: int) -> float:
        """Seconds of `--dry-run` on two hosts."""
        start = time.perf_counter()
        code = self._launch([1, 1], self._folder / "none", "--dry-run").wait(_START_SECONDS)
        if code:
            raise SystemExit(f"the dry run ended with {code}: see {self._folder / 'said'}")
        return time.perf_counter() - start

    def _launch(self, layout: Sequence[int], run: Path, *more: str) -> "subprocess.Popen[bytes]":
        hostfile = self._folder / f"hosts-{len(layout)}"
        lines = [f"{host} slots={slots}\n" for host, slots in zip(NODES, layout, strict=False)]
        hostfile.write_text("".join(lines))
        options = ["--hostfile", str(hostfile), "--ssh-config", str(self._hosts.ssh_config), "--interface", INTERFACE]
        # only ever a run of its first steps
        train = train_arguments(self._corpus, run, max_steps=100_000, save_every_steps=0)
        command = [sys.executable, "-m", "mellow_ds.cli.main", "launch", *options, *more, "--", "train.py", *train]
        with (self._folder / "said").open("wb") as said:
            return subprocess.Popen(
                self._hosts.on(FRONT, command), cwd=measuring.ROOT, env=environment(), stdout=said, stderr=said
            )


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of all rounds, in turns, after one start that warms the file cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        (folder / "hosts").mkdir()
        with hosts_up(folder / "hosts") as hosts:
            starts = Starts(hosts, corpus, folder)
            starts.first_step([2], -1)
            runs = {
                ONE: lambda number: starts.first_step([2], number),
                TWO: lambda number: starts.first_step([1, 1], number),
                DRY: starts.dry_run,
            }
            load = os.getloadavg()
            seconds = measuring.take_turns(runs, rounds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ranks": 2,
        "load_before": list(load),  # of the machine, over 1, 5 and 15 minutes
        "load_after": list(os.getloadavg()),
        "seconds": seconds,
        "median_seconds": middle,
        "second_host_adds_seconds": middle[TWO] - middle[ONE],
    }


def make_corpus(folder: Path) -> Path:
    """Shards of 16 short sounds."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    synthesize(folder / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
    build_shards([folder / "corpus" / "train.json"], folder / "corpus", folder / "train", workers=1)
    return folder / "train"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where asked."""
    options = parse_arguments(arguments)
    reason = why_not()
    if reason:
        raise SystemExit(f"error: hosts cannot be made here: {reason}")
    result = measure(options.rounds)
    middle = result["median_seconds"]
    print("seconds to the first step of two ranks, and of a dry run")
    measuring.print_table(
        ("start", "median seconds", "more than one host"),
        [
            [ONE, f"{middle[ONE]:.1f}", ""],
            [TWO, f"{middle[TWO]:.1f}", f"{result['second_host_adds_seconds']:+.1f}"],
            [DRY, f"{middle[DRY]:.2f}", ""],
        ],
    )
    if options.out:
        given = sys.argv[1:] if arguments is None else arguments
        facts = measuring.context("launch.py", given, threads=1)
        measuring.write_result(options.out, {"benchmark": "launch", **facts, **result})


if __name__ == "__main__":
    main()
