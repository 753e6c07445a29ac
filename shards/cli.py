"""`mellow-shards`: the command line of the packing room. A command imports what is heavy when it runs."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import EXIT_DONE, EXIT_USER, run_command
from mellow_ds.log import setup_logging
from mellow_ds.packing.settings import CODECS, BuildSettings
from mellow_ds.world import World

if TYPE_CHECKING:
    from mellow_ds.packing.build import Report

_DESCRIPTION = "Pack audio files with questions and answers into tar shards, once, and look after them."

_EXAMPLES = """examples:
  mellow-shards synthesize --out corpus
  mellow-shards build --json corpus/train.json --audio-root corpus --out shards/train
  mellow-shards verify shards/train
  mellow-shards inspect shards/train

`mellow-shards COMMAND --help` tells more of each."""

_SYNTHESIZE_EXAMPLES = """examples:
  mellow-shards synthesize --out corpus
  mellow-shards synthesize --out corpus --seed 7 --train-clips 2000 --format flac"""

_BUILD_EXAMPLES = """A record is an object with filepath1, filepath2 (may be empty), caption1, caption2, input, answer,
subtype and taskname (as in ReasonAQA), or with a list: {"clips": ["a.wav", "b.wav"], "input": ..., "answer": ...}.
What cannot be packed is named with the reason in OUT/rejected.jsonl. A build that was stopped goes on when it is
started again; a finished one is left as it is.

examples:
  mellow-shards build --json train.json --audio-root audio --out shards/train
  mellow-shards build --json clotho.json audiocaps.json --audio-root audio --out shards/all --workers 16
  mellow-shards build --json train.json --audio-root audio --out shards/train --codec pcm --max-rejected 0.05"""

_VERIFY_EXAMPLES = """Exit code 0 where all is well, else 2.

examples:
  mellow-shards verify shards/train
  mellow-shards verify shards/train --workers 8"""

_INSPECT_EXAMPLES = """examples:
  mellow-shards inspect shards/train"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mellow-shards` with `arguments` (None: those of the process); returns the exit code."""
    options = _parser().parse_args(arguments)
    setup_logging(World())
    return run_command(lambda: options.handler(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mellow-shards",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_synthesize(commands)
    _add_build(commands)
    _add_verify(commands)
    _add_inspect(commands)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_synthesize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands, "synthesize", "make a corpus of sounds and questions by formula", _SYNTHESIZE_EXAMPLES
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    for split, count in (("train", 600), ("val", 100), ("test", 100)):
        parser.add_argument(
            f"--{split}-clips", type=int, default=count, metavar="N", help=f"clips of {split} (default: {count})"
        )
    parser.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the audio files (default: wav)")
    _add_workers(parser)
    parser.set_defaults(handler=_synthesize)


def _add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add_command(commands, "build", "pack records and audio files into a shard folder", _BUILD_EXAMPLES)
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
    _add_workers(parser)
    parser.set_defaults(handler=_build)


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands, "verify", "check sizes, hashes, checksums and audio of a shard folder", _VERIFY_EXAMPLES
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="shard folder")
    _add_workers(parser)
    parser.set_defaults(handler=_verify)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add_command(commands, "inspect", "print what a shard folder holds", _INSPECT_EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="DIR", help="shard folder")
    parser.set_defaults(handler=_inspect)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="how many work at once; 0: one a CPU (default: 0)"
    )


def _synthesize(options: argparse.Namespace) -> int:
    from mellow_ds.packing.synthesis.corpus import synthesize

    num_clips = {"train": options.train_clips, "val": options.val_clips, "test": options.test_clips}
    synthesize(options.out, num_clips, options.seed, options.format, _num_workers(options))
    return EXIT_DONE


def _build(options: argparse.Namespace) -> int:
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


def _verify(options: argparse.Namespace) -> int:
    from mellow_ds.packing.verify import verify_shards

    started = time.monotonic()
    problems = verify_shards(options.folder, _num_workers(options), progress=True)
    if problems:
        print("\n".join(problems))
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"error: {options.folder} has {what}: copy it again, or build it anew", file=sys.stderr, flush=True)
        return EXIT_USER
    print(f"{options.folder} is well: sizes, hashes, checksums, audio ({time.monotonic() - started:.1f} s)")
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    from mellow_ds.packing.summary import format_summary, summarize

    print(format_summary(options.folder, summarize(options.folder)))
    return EXIT_DONE


def _num_workers(options: argparse.Namespace) -> int:
    from mellow_ds.packing.settings import available_cpus

    return max(options.workers, 0) or available_cpus()
