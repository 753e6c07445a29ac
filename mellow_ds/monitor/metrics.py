"""metrics.jsonl: one JSON object a line, for every recorded step and event of a run, each step once.

A process killed while writing leaves a torn last line; a run that resumes from an older checkpoint goes through steps
again. Opening the file mends both.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from mellow_ds.errors import FaultError

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends records to a file. Each is on disk (as far as the system's buffers) when `write` returns."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        """Open `path`, dropping the records of steps after `resumed_step` (0: a run from the start) and torn lines.

        Raises `FaultError` where the file cannot be read or written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _mend(path, resumed_step)
            # unbuffered and appending: a line is one write to the system
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise FaultError(f"{path} cannot be opened for writing ({error.strerror})") from None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append {kind, step, time, **values}; `time` in seconds since 1970.

        NaN and infinity, which JSON lacks, become null. Raises `FaultError` where the disk is full.
        """
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            num_written = self._file.write(line)
        except OSError as error:
            raise FaultError(f"{self._path} cannot be written ({error.strerror})") from None
        if num_written != len(line):
            raise FaultError(f"{self._path} took only a part of a record: is the disk full?")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole records of a metrics.jsonl, a torn last line left out."""
    records = (_parse(line) for line in path.read_bytes().split(b"\n"))
    return [record for record in records if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _mend(path: Path, resumed_step: int) -> None:
    """Rewrite the file with the whole records up to `resumed_step`; nothing is touched where that is all it holds."""
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line]
    parsed = [(_parse(line), line) for line in lines]
    kept = [line for record, line in parsed if record is not None and record["step"] <= resumed_step]
    mended = b"".join(line + b"\n" for line in kept)
    if mended == content:
        return
    num_torn = sum(record is None for record, _ in parsed)
    num_after = len(lines) - len(kept) - num_torn
    logging.getLogger("mellow_ds").info(
        "%s: dropped %d records after step %d and %d torn lines", path, num_after, resumed_step, num_torn
    )
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(mended)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
