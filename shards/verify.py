"""`mellow-shards verify`: is a shard folder what its manifest says?"""

import argparse
import sys
import time

from mellow_ds.errors import EXIT_DONE, EXIT_USER
from shards.command import Commands, add_command, add_workers, local_folder, num_workers

_EXAMPLES = """Exit code 0 where all is well, else 2.

examples:
  mellow-shards verify shards/train
  mellow-shards verify shards/train --workers 8"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(
        commands, "verify", "check sizes, hashes, checksums and audio of a shard folder", _EXAMPLES, _run
    )
    parser.add_argument("folder", type=local_folder, metavar="DIR", help="shard folder")
    add_workers(parser)


def _run(options: argparse.Namespace) -> int:
    from mellow_ds.packing.verify import verify_shards

    started = time.monotonic()
    problems = verify_shards(options.folder, num_workers(options), progress=True)
    if problems:
        print("\n".join(problems))
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"error: {options.folder} has {what}: copy it again, or build it anew", file=sys.stderr, flush=True)
        return EXIT_USER
    print(f"{options.folder} is well: sizes, hashes, checksums, content ({time.monotonic() - started:.1f} s)")
    return EXIT_DONE
