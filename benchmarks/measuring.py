"""What the benchmarks share: rounds that take turns, facts of the machine, a JSON result, a small table. No torch."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def engine_json(stage: int) -> Path:
    """The engine JSON that users get for a ZeRO stage."""
    return ROOT / f"ds_configs/zero{stage}.json"


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


@dataclass(frozen=True)
class Comparison:
    """What a benchmark that compares variants prints: a line each, the baseline first."""

    title: str
    header: tuple[str, ...]  # variant, seconds, then one a ratio
    seconds: Mapping[str, float]  # by variant
    ratios: tuple[Mapping[str, float], ...]  # times as fast as the baseline, by variant; 1 where it is not named


def comparison_parser(description: str, examples: str, rounds: int, batch_size: int) -> argparse.ArgumentParser:
    """A command line with the flags that all benchmarks take which compare whole models."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--threads", type=positive, default=num_cores(), help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"rounds (default {rounds})")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help=f"examples (default {batch_size})")
    parser.add_argument("--layers", type=positive, help="layers of the decoder (default 30, as SmolLM2-135M)")
    parser.add_argument("--tiny", action="store_true", help="minute networks: shows that it runs, measures nothing")
    parser.add_argument("--seed", type=int, default=0, help="of weights, lengths, tokens and noise (default 0)")
    return parser


def run_comparison(
    name: str,
    arguments: Sequence[str],
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    compared: Callable[[argparse.Namespace, dict[str, Any]], Comparison],
) -> None:
    """Measure, print the table, write the result: what is left of a benchmark called `name` once it has its options."""
    result = measure(options)
    shown = compared(options, result)
    rows = [
        [variant, f"{seconds:.2f}", *(f"{ratios.get(variant, 1):.2f}" for ratios in shown.ratios)]
        for variant, seconds in shown.seconds.items()
    ]
    print(shown.title)
    print_table(shown.header, rows)
    if options.out:
        write_result(options.out, {"benchmark": name, **context(f"{name}.py", arguments, options.threads), **result})


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_turns(runs: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call each run with the number of the round, A, B, C, A, B, C, ..., and collect the seconds that they return.

    Taking turns spreads what else the machine does over all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run(number))
        shown = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"round {number + 1} of {rounds}: {shown}", file=sys.stderr, flush=True)
    return seconds


def timed(run: Callable[[], Any]) -> float:
    """Seconds of wall time that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def context(script: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """What a reader needs to repeat a measurement: hardware, versions, commit, command, date."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_commit(),
        "command": " ".join(["python", f"benchmarks/{script}", *arguments]),
        "hardware": {"cpu": _cpu_name(), "cores": num_cores(), "threads": threads},
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in ("torch", "torchaudio", "transformers")},
        },
        "precision": "float32",
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON, lists of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(key)}: {_dump(value, 2)}" for key, value in result.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="ascii")
    print(f"wrote {path}", file=sys.stderr)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, as wide as its widest cells; all columns but the first to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    for row in [header, rule, *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(f"| {' | '.join(cells)} |")


def _dump(value: Any, indent: int) -> str:
    if isinstance(value, Mapping) and value:
        lines = [f"{' ' * (indent + 2)}{json.dumps(str(key))}: {_dump(v, indent + 2)}" for key, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{' ' * indent}}}"
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        lines = [f"{' ' * (indent + 2)}{json.dumps(item)}" for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{' ' * indent}]"
    return json.dumps(value)


def _cpu_name() -> str:
    """The model name that Linux tells, "unknown" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> dict[str, Any]:
    """The commit of the checkout, and the tracked files that differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        changed = git("diff", "--name-only", "-z", "HEAD").split("\0")
        return {"commit": git("rev-parse", "HEAD").strip(), "changed_files": [name for name in changed if name]}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown"}
