"""files.json: the size and SHA-256 of every file of a step, by which a whole step is told from a damaged one."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.step_folder import STATE_FILE
from mellow_ds.errors import CheckpointError

FILES_NAME = "files.json"


@dataclass(frozen=True)
class FileEntry:
    """What was written."""

    bytes: int
    sha256: str


def entry_of(path: Path) -> FileEntry:
    """Size and hash of a file; raises `OSError`."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        # read here and not by hashlib.file_digest, which Python 3.10 lacks
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return FileEntry(file.tell(), digest.hexdigest())


def write_entries(path: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write a list of files and flush it to the disk."""
    content = {name: asdict(entry) for name, entry in sorted(entries.items())}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(path)


def read_entries(path: Path) -> dict[str, FileEntry]:
    """The inverse of `write_entries`; raises `CheckpointError` where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {str(name): FileEntry(int(e["bytes"]), str(e["sha256"])) for name, e in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path.parent} has no readable {path.name}: it is not a whole checkpoint") from None
    return entries


def flush(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_sizes(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    """Raise `CheckpointError` naming the file that is missing or of another size."""
    for name, expected in entries.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; {expected.bytes} were written")


def verify_checkpoint(folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
    """Raise `CheckpointError` naming the file that is missing, of another size, or whose SHA-256 differs.

    With `num_ranks` > 1 the hashing is divided: this call reads through the share of `rank`.
    """
    entries = read_entries(folder / FILES_NAME)
    check_sizes(folder, entries)
    for name in _share(entries, rank, num_ranks):
        path = folder / name
        try:
            found = entry_of(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        if found != entries[name]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not what was written")


def is_step_folder(folder: Path) -> bool:
    """Whether a folder holds what a run saved, whose files can be checked; others are exported or converted models."""
    return (folder / FILES_NAME).is_file() or (folder / STATE_FILE).is_file()


def damage_of(folder: Path, peers: Peers) -> str:
    """What is wrong with a step folder, the same line on all ranks, which share the reading; empty where nothing is."""
    own = ""
    try:
        verify_checkpoint(folder, peers.world.rank, peers.world.size)
    except (CheckpointError, OSError) as error:
        own = str(error)
    return next(filter(None, peers.texts(own)), "")


def _share(entries: Mapping[str, FileEntry], rank: int, num_ranks: int) -> Iterable[str]:
    """The files of one rank: the largest first, each to the rank that has the least to read."""
    num_bytes = [0] * num_ranks
    for name in sorted(entries, key=lambda name: (-entries[name].bytes, name)):
        reader = num_bytes.index(min(num_bytes))
        num_bytes[reader] += entries[name].bytes
        if reader == rank:
            yield name
