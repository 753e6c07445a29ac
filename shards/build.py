"""`mellow-shards build`: records and audio files into a shard folder."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import EXIT_DONE
from mellow_ds.packing.settings import CODECS, BuildSettings
from shards.command import Commands, add_command, add_workers

if TYPE_CHECKING:
    from mellow_ds.packing.build import Report

_EXAMPLES = """A record is an object with filepath1, filepath2 (may be empty), caption1, caption2, input, answer,
subtype and taskname (as in ReasonAQA), or with a list: {"clips": ["a.wav", "b.wav"], "input": ..., "answer": ...}.
What cannot be packed is named with the reason in OUT/rejected.jsonl. A build that was stopped goes on when it is
started again; a finished one is left as it is.

examples:
  mellow-shards build --json train.json --audio-root audio --out shards/train
  mellow-shards build --json clotho.json audiocaps.json --audio-root audio --out shards/all --workers 16
  mellow-shards build --json train.json --audio-root audio --out shards/train --codec pcm --max-rejected 0.05"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "build", "pack records and audio files into a shard folder", _EXAMPLES, _run)
    default = BuildSettings()
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
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="shard folder to write")
    parser.add_argument(
        "--codec",
        choices=tuple(CODECS),
        default=default.codec,
        help=f"flac, or pcm: 16-bit WAV, larger and faster to read (default: {default.codec})",
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        default=default.sample_rate,
        metavar="HZ",
        help=f"of the stored audio (default: {default.sample_rate})",
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
    add_workers(parser)


def _run(options: argparse.Namespace) -> int:
    given = {setting.name: vars(options)[setting.name] for setting in fields(BuildSettings) if setting.name in options}
    settings = BuildSettings(**given, progress=True)
    from mellow_ds.packing.build import run_build

    report = run_build(options.json, options.audio_root, options.out, settings)
    print(_describe_build(options.out, report))
    return EXIT_DONE


def _describe_build(out: Path, report: "Report") -> str:
    manifest = report.manifest
    state = "is already there, built from the same input: nothing to do" if report.was_finished else "is built"
    lines = [
        f"{out} {state}",
        f"clips        {manifest.num_clips:,}",
        f"questions    {manifest.num_questions:,}",
        f"shards       {len(manifest.shards):,}, {report.num_bytes:,} bytes",
        f"replication  {report.replication:.3f} stored clips a clip",
        f"rejected     {sum(report.rejected.values()):,} records",
        *(f"               {count:,} {reason}" for reason, count in report.rejected.items()),
        f"seconds      {report.seconds:.1f}",
    ]
    if report.rejected:
        lines.append(f"{out / 'rejected.jsonl'} names each rejected record")
    if report.num_reused and not report.was_finished:
        lines.append(f"{report.num_reused} shards were taken over from an interrupted build")
    return "\n".join(lines)
