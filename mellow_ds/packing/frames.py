"""Byte strings one after the other in a file, each behind its length: the form of a build's scratch files."""

from collections.abc import Iterator
from typing import BinaryIO

_LENGTH_BYTES = 4
_BLOCK_BYTES = 1 << 17


def write_frame(file: BinaryIO, content: bytes) -> int:
    """Write a byte string of less than 4 GiB; returns the bytes that it takes in the file."""
    file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
    file.write(content)
    return _LENGTH_BYTES + len(content)


def read_frames(file: BinaryIO, num_bytes: int | None = None) -> Iterator[bytes]:
    """The byte strings in the next `num_bytes` of the file, or up to its end; in memory is a block of them at a time.

    The file should be opened without a buffer: it is read in blocks.
    """
    rest = b""
    while block := file.read(_BLOCK_BYTES if num_bytes is None else min(_BLOCK_BYTES, num_bytes)):
        num_bytes = None if num_bytes is None else num_bytes - len(block)
        rest += block
        place, end = 0, len(rest)
        while place + _LENGTH_BYTES <= end:
            start = place + _LENGTH_BYTES
            stop = start + int.from_bytes(rest[place:start], "big")
            if stop > end:
                break
            yield rest[start:stop]
            place = stop
        rest = rest[place:]
    assert not rest, "the file ends within a frame"
