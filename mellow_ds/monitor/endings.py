"""How a run ended: the ranks that failed, first one first, in a file that all ranks can read.

The first line counts. What the other ranks run into afterwards, a broken connection or a collective that nobody
answers, is a consequence, and they quote the first line instead.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mellow_ds.errors import EXIT_FAULT

ENDINGS_NAME = "endings.jsonl"
_MAX_MESSAGE = 2000  # characters: a line is one write, and small ones do not mix


@dataclass(frozen=True)
class Ending:
    """What one rank had to say when it failed, or when it found the run standing still."""

    rank: int
    message: str  # one line
    exit_code: int = EXIT_FAULT
    # "stop": by a signal; "lost": its host does not answer; "hang": `message` is about the run, not about the rank that
    # says it
    kind: str = "failure"


def make_endings(folder: Path) -> None:
    """An empty file in `folder`: it is there before anybody looks, as file servers remember what was not there."""
    (folder / ENDINGS_NAME).write_bytes(b"")


def add_ending(folder: Path, ending: Ending) -> None:
    """Append; raises `OSError` where that cannot be done."""
    record = {**asdict(ending), "message": ending.message[:_MAX_MESSAGE], "time": round(time.time(), 3)}
    handle = os.open(folder / ENDINGS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def first_ending(folder: Path) -> Ending | None:
    """The first whole line; None while there is none, or where the file cannot be read."""
    try:
        content = (folder / ENDINGS_NAME).read_bytes()
    except OSError:
        return None
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
            return Ending(int(record["rank"]), str(record["message"]), int(record["exit_code"]), str(record["kind"]))
        except (ValueError, KeyError, TypeError):
            continue
    return None


def tell_torchrun(message: str, error_file: str | None) -> None:
    """Leave the message where torchrun looks for it, so that its closing report shows it (TORCHELASTIC_ERROR_FILE)."""
    if not error_file:
        return
    # torchrun counts in seconds, and of two takes the lower rank for the first: ranks that end of this one come later
    seconds = str(int(time.time()) - 1)
    content = {"message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": seconds}}}
    try:
        Path(error_file).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        return  # its report then says less
