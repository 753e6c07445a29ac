"""The drop list: clips and questions that a build is told to leave out. `mellow-shards audit` writes such files.

JSON lines, one an entry: {"kind": "clip", "id": KEY, "reason": "..."} with the key of a clip (the hash of its source
file), or {"kind": "question", "id": ID, "reason": "..."}. What is listed and not there is passed over.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mellow_ds.errors import PackingError
from mellow_ds.packing.packed_keys import PACKED_DTYPE
from mellow_ds.shard_format import KEY_LENGTH

_ID = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")


class NameSet:
    """Keys or ids (hexadecimal), each once, in 16 bytes of memory: a list of them may be long."""

    def __init__(self, packed: bytes = b"") -> None:
        """`packed`: the bytes of all names, one after the other."""
        self._sorted = np.unique(np.frombuffer(packed, dtype=PACKED_DTYPE))

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: str) -> bool:
        return self.place(name) is not None

    def place(self, name: str) -> int | None:
        """Where a name stands among all in order, from 0; None where it does not."""
        wanted = bytes.fromhex(name).rstrip(b"\0")
        place = bisect_left(self._sorted, wanted)
        return place if place < len(self) and self._sorted[place] == wanted else None


@dataclass(frozen=True)
class DropList:
    """What is to be left out."""

    clips: NameSet = field(default_factory=NameSet)  # keys; every question about one of them is left out
    questions: NameSet = field(default_factory=NameSet)  # ids
    sha256: str = ""  # of the file; empty without one


def read_drop_list(path: Path | None) -> DropList:
    """The drop list of a file, empty without one; raises `PackingError` naming the line that is none."""
    if path is None:
        return DropList()
    digest = hashlib.sha256()  # fed by _lines
    found = {"clip": bytearray(), "question": bytearray()}
    try:
        for number, line in enumerate(_lines(path, digest.update), start=1):
            if line.strip():
                kind, name = _read_line(line, f"{path}, line {number}")
                found[kind] += bytes.fromhex(name)
    except OSError as error:
        raise PackingError(f"{path} cannot be read ({error.strerror}): correct --drop-list") from None
    except ValueError as error:
        raise PackingError(f"{path} is not UTF-8 text ({error}): correct --drop-list") from None
    return DropList(NameSet(bytes(found["clip"])), NameSet(bytes(found["question"])), digest.hexdigest())


def _lines(path: Path, on_bytes: Callable[[bytes], None]) -> Iterator[str]:
    encoding = "utf-8-sig"
    with path.open("rb") as file:
        for line in file:
            on_bytes(line)
            yield line.decode(encoding)
            encoding = "utf-8"


def _read_line(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or entry.get("kind") not in ("clip", "question"):
        raise PackingError(
            f'{where} is no entry of a drop list; wanted is {{"kind": "clip" or "question", "id": ..., "reason": ...}}'
        )
    name = entry.get("id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise PackingError(f"{where}: the id is {name!r}; wanted are {KEY_LENGTH} hexadecimal digits")
    return entry["kind"], name
