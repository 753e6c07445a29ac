"""`mellow-shards synthesize`: a corpus of sounds and questions by formula."""

import argparse
from pathlib import Path

from mellow_ds.errors import EXIT_DONE
from shards.command import Commands, add_command, add_workers, num_workers

_EXAMPLES = """examples:
  mellow-shards synthesize --out corpus
  mellow-shards synthesize --out corpus --seed 7 --train-clips 2000 --format flac"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "synthesize", "make a corpus of sounds and questions by formula", _EXAMPLES, _run)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    for split, count in (("train", 600), ("val", 100), ("test", 100)):
        parser.add_argument(
            f"--{split}-clips", type=int, default=count, metavar="N", help=f"clips of {split} (default: {count})"
        )
    parser.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the audio files (default: wav)")
    add_workers(parser)


def _run(options: argparse.Namespace) -> int:
    from mellow_ds.packing.synthesis.corpus import synthesize

    num_clips = {"train": options.train_clips, "val": options.val_clips, "test": options.test_clips}
    synthesize(options.out, num_clips, options.seed, options.format, num_workers(options))
    return EXIT_DONE
