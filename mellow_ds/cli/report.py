"""`mellow-ds report`: what a run came to, in one table: accuracy by task, silenced, chance, speed, where things are."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, ConfigError
from mellow_ds.option_parser import OptionParser

_EXAMPLES = """
examples:
  mellow-ds report runs/quickstart/run
  mellow-ds report runs/quickstart/run --require-hearing
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments, program)
    from mellow_ds.evaluation.results import format_results

    path = newest_results(options.run)
    results = json.loads(path.read_text(encoding="utf-8"))
    print(format_results(results))
    print()
    for name, value in [*speeds(options.run, results), *places(options.run, path)]:
        print(f"{name:<42} {value}")
    if options.require_hearing and not hears(results):
        print("the model does not clearly use the audio: its accuracy is not above the one with silence")
        return EXIT_FAULT
    return EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(
        prog=program,
        description="Show the newest evaluation of a run, its speed, and where its files are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder (save_dir)")
    parser.add_argument(
        "--require-hearing", action="store_true",
        help="end with code 1 unless the accuracy with audio is clearly above the one with silence",
    )  # fmt: skip
    return parser.parse_args(arguments)


def newest_results(run: Path) -> Path:
    """The results.json written last below RUN/evaluation; raises `ConfigError` where there is none."""
    if not run.is_dir():
        raise ConfigError(f"run folder {run} is not there: name the save_dir of a run")
    found = sorted(run.glob("evaluation/**/results.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{run} has no evaluation results: run mellow-ds evaluate with --save-dir {run} first")
    return found[-1]


def hears(results: dict[str, Any]) -> bool:
    """Whether the 95 percent interval of the accuracy with audio lies wholly above that with silence."""
    silenced = results.get("silenced")
    if silenced is None:
        raise ConfigError("the results have no silenced pass: evaluate with --evaluation.compare_silence true")
    low, _ = results["overall"]["interval_95"]
    _, high = silenced["overall"]["interval_95"]
    return bool(low > high)


def speeds(run: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Examples a second over all ranks, in training (median of the records) and in generation."""
    from mellow_ds.monitor.metrics import METRICS_NAME, read_metrics

    rows = []
    if (run / METRICS_NAME).is_file():
        records = [record for record in read_metrics(run / METRICS_NAME) if record.get("kind") == "step"]
        if records:
            rate = statistics.median(record["examples_per_second"] for record in records)
            rows.append((f"trained examples a second ({records[-1]['step']} steps)", f"{rate:.1f}"))
    generation = results["generation"]
    rows.append(
        (f"generated answers a second ({generation['world_size']} ranks)", f"{generation['examples_per_second']:.1f}")
    )
    return rows


def places(run: Path, results: Path) -> list[tuple[str, str]]:
    """Where to look further."""
    return [
        ("run folder", str(run)),
        ("predictions and results", str(results.parent)),
        ("TensorBoard", f"tensorboard --logdir {run / 'tensorboard'}"),
    ]
