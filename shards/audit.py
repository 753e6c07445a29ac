"""`mellow-shards audit`: is what the shards hold fit to be trained and tested on?"""

import argparse
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, EXIT_USER, PackingError
from mellow_ds.packing.audit.settings import DEFAULT_DROP, KINDS, AuditSettings
from shards.command import Commands, add_command, add_workers, num_workers

_EXAMPLES = f"""Looks at coverage by subtype and split; damaged, near-silent, clipped and duplicate audio;
empty, repeated and too long texts; options that cannot be read and letters that are right too often; clips and
questions that several splits have. Name the training split first: what a later one has too counts against it.

Exit code 0 with findings; with --strict 2 where a serious one is among them.
A drop-list is for one build: --drop-list FILE is that of the first folder, --drop-list val=FILE of another.

findings (in brackets: not on the drop-list unless --drop names them):
  {"  ".join(name if name in DEFAULT_DROP else f"[{name}]" for name in KINDS)}

examples:
  mellow-shards audit shards/train
  mellow-shards audit train=shards/train val=shards/val test=shards/test --json audit.json --strict
  mellow-shards audit train=shards/train val=shards/val --tokenizer HuggingFaceTB/SmolLM2-135M --workers 8
  mellow-shards audit train=shards/train val=shards/val --drop-list drop.jsonl
  mellow-shards build --json train.json --audio-root audio --out shards/clean --drop-list drop.jsonl"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "audit", "look for what is wrong with the content of shards", _EXAMPLES, _run)
    default = AuditSettings()
    parser.add_argument("folders", nargs="+", metavar="[SPLIT=]DIR", help="shard folders, training first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--drop-list",
        action="append",
        default=[],
        metavar="[SPLIT=]FILE",
        help="write what `mellow-shards build --drop-list` is to leave out, as JSON lines",
    )
    parser.add_argument(
        "--drop",
        nargs="+",
        choices=tuple(KINDS),
        default=DEFAULT_DROP,
        metavar="FINDING",
        help="findings that go on the drop-list",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 2 where something serious is found")
    parser.add_argument(
        "--tokenizer",
        default=default.tokenizer,
        metavar="NAME",
        help="folder, GGUF file or hub name of the tokenizer that texts are measured with (default: words are counted)",
    )
    for name, what in (("ip_text_len", "prompt"), ("op_text_len", "answer")):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(default, name),
            metavar="N",
            help=f"tokens after which {what}s are cut in training (default: {getattr(default, name)})",
        )
    for name, what in (("silent_peak", "peak"), ("silent_rms", "root mean square")):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(default, name),
            metavar="DBFS",
            help=f"a clip is near silent where its {what} is lower (default: {getattr(default, name):g})",
        )
    parser.add_argument(
        "--clipped-share",
        type=float,
        default=default.clipped_share,
        metavar="SHARE",
        help=f"share of samples at full scale that makes a clip clipped (default: {default.clipped_share:g})",
    )
    add_workers(parser)


def _run(options: argparse.Namespace) -> int:
    folders = _named(options.folders, "folder")
    drop_lists = _drop_lists(options.drop_list, tuple(folders))
    settings = AuditSettings(
        silent_peak=options.silent_peak,
        silent_rms=options.silent_rms,
        clipped_share=options.clipped_share,
        ip_text_len=options.ip_text_len,
        op_text_len=options.op_text_len,
        tokenizer=options.tokenizer,
    )
    from mellow_ds.packing.audit.findings import audit_shards
    from mellow_ds.packing.audit.report import format_report, write_drop_list, write_json

    report = audit_shards(folders, settings, num_workers(options), progress=True)
    if options.json:
        write_json(report, options.json)
    said = []
    for split, path in drop_lists.items():
        num_clips, num_questions = write_drop_list(report, split, options.drop, path)
        said.append(f"{path}: {num_clips:,} clips and {num_questions:,} questions to leave out of {split}")
    print("\n\n".join([format_report(report), *(["\n".join(said)] if said else [])]))
    return EXIT_USER if options.strict and report.is_serious else EXIT_DONE


def _named(given: list[str], what: str) -> dict[str, Path]:
    """`SPLIT=PATH` or `PATH` as name -> path; a plain path is called by its last part."""
    named: dict[str, Path] = {}
    for text in given:
        name, found, path = text.partition("=")
        if "://" in text:
            raise PackingError(f"{text} is an address: this command reads folders, so copy the shards first")
        if not found or "/" in name or not path:
            name, path = Path(text).resolve().name or text, text
        if name in named:
            raise PackingError(f"two folders are called '{name}': give each {what} a name, as in train={path}")
        named[name] = Path(path)
    return named


def _drop_lists(given: list[str], splits: tuple[str, ...]) -> dict[str, Path]:
    """Split -> file that its drop-list goes to; a plain file is the first split's."""
    files: dict[str, Path] = {}
    for text in given:
        name, found, path = text.partition("=")
        if found and name not in splits and "/" not in name:
            raise PackingError(f"--drop-list {text}: no split is called {name}; they are {', '.join(splits)}")
        if not found or name not in splits:
            name, path = splits[0], text
        if name in files:
            raise PackingError(f"--drop-list is given twice for {name}: name the split, as in {splits[-1]}={path}")
        files[name] = Path(path)
    return files
