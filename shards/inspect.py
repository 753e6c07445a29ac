"""`mellow-shards inspect`: what a shard folder holds."""

import argparse
from pathlib import Path

from mellow_ds.errors import EXIT_DONE
from shards.command import Commands, add_command, local_folder

_DEFAULT_LEVELS = 200

_EXAMPLES = """Levels are those of a few clips, the same each time; texts are measured in words. `mellow-shards audit`
looks at all clips, and judges.

examples:
  mellow-shards inspect shards/train
  mellow-shards inspect shards/train --plot train.png
  mellow-shards inspect shards/train --levels 0"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "inspect", "print what a shard folder holds", _EXAMPLES, _run)
    parser.add_argument("folder", type=local_folder, metavar="DIR", help="shard folder")
    parser.add_argument(
        "--levels",
        type=int,
        default=_DEFAULT_LEVELS,
        metavar="N",
        help=f"clips to decode for their peak and RMS level (default: {_DEFAULT_LEVELS}; 0: none)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw histograms (needs matplotlib)")


def _run(options: argparse.Namespace) -> int:
    from mellow_ds.packing.inspection.summary import format_summary, summarize

    summary = summarize(options.folder, max(options.levels, 0), progress=True)
    print(format_summary(options.folder, summary))
    if options.plot:
        from mellow_ds.packing.inspection.plot import plot_summary

        plot_summary(options.folder, summary, options.plot)
        print(f"\n{options.plot} shows it")
    return EXIT_DONE
