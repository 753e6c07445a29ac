"""`mellow-shards inspect`: what a shard folder holds."""

import argparse
from pathlib import Path

from mellow_ds.errors import EXIT_DONE
from shards.command import Commands, add_command

_EXAMPLES = """examples:
  mellow-shards inspect shards/train"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "inspect", "print what a shard folder holds", _EXAMPLES, _run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="shard folder")


def _run(options: argparse.Namespace) -> int:
    from mellow_ds.packing.summary import format_summary, summarize

    print(format_summary(options.folder, summarize(options.folder)))
    return EXIT_DONE
