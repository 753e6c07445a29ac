"""`mellow-shards build`: records and audio files into a shard folder."""

import argparse
from dataclasses import fields
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, PackingError
from mellow_ds.packing.settings import CODECS, BuildSettings
from shards.build_report import describe_report
from shards.command import Commands, add_command, add_workers

_EXAMPLES = """A record is an object with filepath1, filepath2 (may be empty), caption1, caption2, input, answer,
subtype and taskname (as in ReasonAQA), or with a list: {"clips": ["a.wav", "b.wav"], "input": ..., "answer": ...}.
What cannot be packed is named with the reason in OUT/rejected.jsonl. A build that was stopped goes on when it is
started again; a finished one is left as it is.

With --num-parts N, this packs one of N parts, which can be built at the same time on machines that know nothing of each
other but share the audio; part I goes into OUT/part-0000I-of-0000N. `mellow-shards merge` joins them, and
launch/slurm/build_shards.sbatch runs one a SLURM task.

examples:
  mellow-shards build --json train.json --audio-root audio --out shards/train
  mellow-shards build --json clotho.json audiocaps.json --audio-root audio --out shards/all --workers 16
  mellow-shards build --json train.json --audio-root audio --out shards/train --codec pcm --max-rejected 0.05
  mellow-shards build --json train.json --audio-root audio --out shards/train --num-parts 16 --part 3
  mellow-shards build --json train.json --audio-root audio --out shards/clean --drop-list drop.jsonl"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "build", "pack records and audio files into a shard folder", _EXAMPLES, _run)
    _add_input(parser)
    _add_form(parser)
    add_workers(parser)


def _add_input(parser: argparse.ArgumentParser) -> None:
    """What is packed, and where to."""
    parser.add_argument(
        "--json",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="lists of records, packed together",
    )
    parser.add_argument(
        "--audio-root", type=Path, required=True, metavar="DIR", help="folder that the paths in the records start from"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="shard folder to write (with --num-parts, the folder that the parts lie in)",
    )
    parser.add_argument(
        "--drop-list",
        type=Path,
        metavar="FILE",
        help="leave out the clips and questions that FILE names, as `mellow-shards audit` writes it; JSON lines "
        '{"kind": "clip" or "question", "id": ..., "reason": ...}',
    )
    parser.add_argument(
        "--num-parts",
        type=int,
        metavar="N",
        help="pack one of N parts, into a folder of its own below --out",
    )
    parser.add_argument("--part", type=int, metavar="I", help="which part, from 0 to N - 1")


def _add_form(parser: argparse.ArgumentParser) -> None:
    """How it is stored, and what may be left out."""
    default = BuildSettings()
    parser.add_argument(
        "--codec",
        choices=tuple(CODECS),
        default=default.codec,
        help="flac; pcm: 16-bit WAV, larger and faster to read; opus: smallest, not exact, stored at 48 kHz "
        f"(default: {default.codec})",
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        default=default.sample_rate,
        metavar="HZ",
        help=f"of the audio that a reader gets (default: {default.sample_rate})",
    )
    parser.add_argument(
        "--shard-megabytes",
        type=float,
        default=default.shard_megabytes,
        metavar="N",
        help=f"about the size of a shard (default: {default.shard_megabytes:g})",
    )
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=default.max_rejected,
        metavar="SHARE",
        help=f"share of the records that may be left out before the build fails (default: {default.max_rejected})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished build of other input or settings in --out"
    )


def _run(options: argparse.Namespace) -> int:
    if (options.num_parts is None) != (options.part is None):
        raise PackingError("--num-parts and --part go together: give how many parts there are, and which this is")
    if options.num_parts is not None and options.num_parts < 1:
        raise PackingError(f"--num-parts is {options.num_parts}; it must be 1 or more")
    asked = {name: value for name, value in vars(options).items() if value is not None}
    given = {setting.name: asked[setting.name] for setting in fields(BuildSettings) if setting.name in asked}
    settings = BuildSettings(**given, progress=True)
    from mellow_ds.packing.build import run_build

    report = run_build(options.json, options.audio_root, options.out, settings)
    print(describe_report(report, "is built"))
    return EXIT_DONE
