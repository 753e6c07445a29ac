"""`mellow-shards`: the command line of the packing room. A command imports what is heavy when it runs."""

import argparse
from collections.abc import Sequence

from mellow_ds.errors import run_command
from mellow_ds.log import setup_logging
from mellow_ds.option_parser import OptionParser
from mellow_ds.world import World
from shards import audit, build, features, inspect, merge, plan, synthesize, verify

_COMMANDS = (synthesize, build, merge, verify, inspect, audit, plan, features)

_DESCRIPTION = "Pack audio files with questions and answers into tar shards, once, and look after them."

_EXAMPLES = """examples:
  mellow-shards synthesize --out corpus
  mellow-shards build --json corpus/train.json --audio-root corpus --out shards/train
  mellow-shards verify shards/train
  mellow-shards inspect shards/train --plot shards.png
  mellow-shards features --shards shards/train --checkpoint RUN/checkpoints/step-002000 --out shards/train-features
  mellow-shards audit train=shards/train val=shards/val

`mellow-shards COMMAND --help` tells more of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mellow-shards` with `arguments` (None: those of the process); returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    setup_logging(World())
    return run_command(lambda: options.handler(options))


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="mellow-shards",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
