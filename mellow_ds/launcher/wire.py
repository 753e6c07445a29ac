"""The lines between the launcher and a host's agent: one JSON object each.

What the agent says begins with a mark, because a login shell may print lines of its own into the same stream.
Standard library only: it runs on every host before anything is known of that.
"""

import json
import re
from typing import Any

MARK = b"\x1e"  # the record separator of RFC 7464
BEAT_SECONDS = 2.0  # between two signs of life, in both directions
SILENCE_SECONDS = 15.0  # without one: the other side is gone
LOST_GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL where the run is lost; with the silence below 30 s
_MAX_LINE_BYTES = 65_536  # a line of a rank that goes on is cut here
_ENDS = re.compile(rb"\r\n|\n|\r")  # a progress bar ends its lines with \r

Message = dict[str, Any]


def encode(message: Message, marked: bool = False) -> bytes:
    """A message as a line."""
    return (MARK if marked else b"") + json.dumps(message).encode("ascii") + b"\n"


def decode(line: bytes) -> Message | None:
    """The message of a marked line; None: a line that no agent wrote."""
    if not line.startswith(MARK):
        return None
    try:
        message = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


class Lines:
    """Whole lines out of pieces of a stream."""

    def __init__(self, max_bytes: int = _MAX_LINE_BYTES, only_newlines: bool = False) -> None:
        """`only_newlines`: a \\r is part of the line; `max_bytes` 0: lines are never cut."""
        self._left = b""
        self._max_bytes = max_bytes
        self._only_newlines = only_newlines

    def add(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes, without their ends."""
        data = self._left + piece
        if self._only_newlines:
            *lines, self._left = data.split(b"\n")
        else:
            held = data[-1:] if data.endswith(b"\r") else b""  # its \n may be the next byte
            *lines, left = _ENDS.split(data[: len(data) - len(held)])
            self._left = left + held
        if self._max_bytes and len(self._left) > self._max_bytes:
            lines.append(self._left)
            self._left = b""
        return lines

    def rest(self) -> list[bytes]:
        """What stands after the last end of a line."""
        left, self._left = self._left.rstrip(b"\r"), b""
        return [left] if left else []
