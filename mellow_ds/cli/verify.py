"""`mellow-ds verify`: shows here that every back end computes the same step, and that a run goes on exactly."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT
from mellow_ds.option_parser import OptionParser

_DESCRIPTION = """
Train a small made-up model on CPU processes of this machine, by every back end and ZeRO stage, and compare. Needs no
data, no GPU and no network. Ends with code 1 where something differs by more than it may.
"""
_EXAMPLES = """
equivalence: 20 steps by every back end, world size and accumulation, against plain PyTorch (10 minutes on 2 cores)
resume:      N steps at once, against k steps, a checkpoint, and N - k by other processes
checkpoints: a checkpoint of each back end and world, taken up on every other world and by every other back end
             (15 minutes)

examples:
  mellow-ds verify equivalence --quick
  mellow-ds verify equivalence --worlds 1,2 --json equivalence.json
  mellow-ds verify resume
  mellow-ds verify checkpoints --quick
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments, program)
    # everything is compared on CPUs; set before DeepSpeed looks for an accelerator, here and in the ranks
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    started = time.monotonic()
    result = {"equivalence": _equivalence, "resume": _resume, "checkpoints": _checkpoints}[options.what](options)
    seconds = time.monotonic() - started
    print(f"{result['summary']} ({seconds:.0f} s)")
    if options.json:
        options.json.write_text(json.dumps({**result, "seconds": round(seconds, 1)}, indent=1) + "\n", encoding="utf-8")
    return EXIT_DONE if result["is_well"] else EXIT_FAULT


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(
        prog=program, description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="{equivalence,resume,checkpoints}")
    same = commands.add_parser("equivalence", help="the same steps by every back end, world size and accumulation")
    same.add_argument("--steps", type=_positive, default=20, help="optimizer steps (default 20)")
    same.add_argument("--worlds", type=_numbers, default=(1, 2, 4), help="numbers of processes (default 1,2,4)")
    same.add_argument("--accumulations", type=_numbers, default=(1, 2, 4), help="micro-batches (default 1,2,4)")
    resume = commands.add_parser("resume", help="N steps at once against k, a checkpoint, and N - k")
    resume.add_argument("--world", type=_positive, default=2, help="processes of the run (default 2)")
    resume.add_argument("--others", type=_numbers, default=(1, 3), help="processes it resumes on too (default 1,3)")
    checkpoints = commands.add_parser(
        "checkpoints", help="a checkpoint of each back end and world, loaded by any other"
    )
    checkpoints.add_argument("--worlds", type=_numbers, default=(1, 2, 3, 4, 8), help="processes (default 1,2,3,4,8)")
    for command in (same, resume, checkpoints):
        command.add_argument("--quick", action="store_true", help="a sample that meets everything once")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _equivalence(options: argparse.Namespace) -> dict[str, Any]:
    from mellow_ds.verify import equivalence

    choose = equivalence.sample_cases if options.quick else equivalence.all_cases
    cases = choose(options.worlds, options.accumulations)
    facts = equivalence.facts(options.steps)
    _say(
        f"reference: {facts['steps']} steps, {facts['clipped_steps']} of them clipped, loss {facts['first_loss']:.4f} "
        f"to {facts['last_loss']:.4f}, weights up to {facts['largest_weight']:.2f}, "
        f"moved by up to {facts['largest_movement']:.2f}"
    )
    differences = equivalence.compare(cases, options.steps, _say)
    print(equivalence.table(differences))
    return _result(
        differences,
        f"losses and gradient norms to {equivalence.LOSS_TOLERANCE:g} relative, weights to "
        f"{equivalence.WEIGHT_TOLERANCE:g} absolute",
        facts,
    )


def _resume(options: argparse.Namespace) -> dict[str, Any]:
    from mellow_ds.verify import resume

    rows = resume.compare(resume.choose(options.quick), options.world, options.others, _say)
    print(resume.table(rows))
    wanted = f"bit for bit on the same world, to {resume.TOLERANCE:g} on another one, the same examples always"
    return _result(rows, wanted, {"steps": resume.NUM_STEPS, "checkpoint_at": resume.STOP_AT})


def _checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    from mellow_ds.verify import checkpoints

    choose = checkpoints.sample_pairs if options.quick else checkpoints.every_pair
    rows = checkpoints.compare(choose(options.worlds), _say)
    print(checkpoints.tables(rows))
    wanted = f"losses and weights to {checkpoints.TOLERANCE:g}, all else equal"
    return _result(rows, wanted, {"steps": checkpoints.LAST_STEP, "checkpoint_at": checkpoints.STOP_AT})


def _result(rows: Sequence[Any], wanted: str, facts: dict[str, Any]) -> dict[str, Any]:
    bad = sum(not row.is_well for row in rows)
    return {
        "summary": f"{len(rows) - bad} of {len(rows)} as wanted: {wanted}",
        "is_well": not bad,
        **facts,
        "rows": [{**dataclasses.asdict(row), "is_well": row.is_well} for row in rows],
    }
