"""The drop list: clips and questions that a build is told to leave out. `mellow-shards audit` writes such files.

JSON lines, one an entry: {"kind": "clip", "id": KEY, "reason": "..."} with the key of a clip (the hash of its source
file), or {"kind": "question", "id": ID, "reason": "..."}. What is listed and not there is passed over.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from mellow_ds.errors import PackingError
from mellow_ds.shard_format import KEY_LENGTH

_ID = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")


@dataclass(frozen=True)
class DropList:
    """What is to be left out."""

    clips: frozenset[str] = frozenset()  # keys; every question about one of them is left out
    questions: frozenset[str] = frozenset()  # ids
    sha256: str = ""  # of the file; empty without one


def read_drop_list(path: Path | None) -> DropList:
    """The drop list of a file, empty without one; raises `PackingError` naming the line that is none."""
    if path is None:
        return DropList()
    try:
        payload = path.read_bytes()
        lines = payload.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise PackingError(f"{path} cannot be read ({error.strerror}): correct --drop-list") from None
    except ValueError as error:
        raise PackingError(f"{path} is not UTF-8 text ({error}): correct --drop-list") from None
    found: dict[str, set[str]] = {"clip": set(), "question": set()}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            kind, name = _read_line(line, f"{path}, line {number}")
            found[kind].add(name)
    return DropList(frozenset(found["clip"]), frozenset(found["question"]), hashlib.sha256(payload).hexdigest())


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
