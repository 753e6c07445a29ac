"""What every command of `mellow-shards` says in the same way: its place in the parser and how many work at once."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, summary: str, epilog: str, handler: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A parser of the command `name`, whose options go to `handler`, which returns the exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler, parser=parser, takes_overrides=False)
    return parser


def local_folder(text: str) -> Path:
    """A folder as an argument; addresses are refused by name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address: this command reads folders, so copy the shards first")
    return Path(text)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The option --workers."""
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="how many work at once; 0: one a CPU (default: 0)"
    )


def num_workers(options: argparse.Namespace) -> int:
    """What --workers comes to, at least 1."""
    from mellow_ds.packing.settings import available_cpus

    return max(options.workers, 0) or available_cpus()
