"""`mellow-shards merge`: the parts of a build into one shard folder."""

import argparse
from dataclasses import fields
from pathlib import Path

from mellow_ds.errors import EXIT_DONE
from mellow_ds.packing.settings import MERGE_METHODS, MergeSettings
from shards.build_report import describe_report
from shards.command import Commands, add_command

_EXAMPLES = """All parts of one build must be given, each once and built to its end. Questions, clips and what was left
out are those of one build of everything. A merge that was stopped is started again; a finished one is left as it is.

examples:
  mellow-shards merge shards/train/part-*-of-00016 --out shards/train
  mellow-shards merge /scratch/parts/part-* --out shards/train --method copy"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "merge", "join the parts of a build into one shard folder", _EXAMPLES, _run)
    default = MergeSettings()
    parser.add_argument(
        "parts", type=Path, nargs="+", metavar="PART", help="folders that `mellow-shards build --num-parts` made"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="shard folder to write; may be the one the parts lie in"
    )
    parser.add_argument(
        "--method",
        choices=MERGE_METHODS,
        default=default.method,
        help="link: hard links to the files of the parts, copies where there can be none; copy; move: like link, then "
        f"the parts are removed (default: {default.method})",
    )
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=default.max_rejected,
        metavar="SHARE",
        help=f"share of all records that may have been left out (default: {default.max_rejected})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished build of something else in --out")


def _run(options: argparse.Namespace) -> int:
    given = {setting.name: vars(options)[setting.name] for setting in fields(MergeSettings) if setting.name in options}
    settings = MergeSettings(**given, progress=True)
    from mellow_ds.packing.parts.merge import run_merge

    report = run_merge(options.parts, options.out, settings)
    print(describe_report(report, f"is joined from {len(options.parts)} parts"))
    return EXIT_DONE
