"""Records written down as they are read, so that JSON is parsed once: scratch of one build, in msgpack."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from mellow_ds.packing.frames import read_frames, write_frame
from mellow_ds.packing.records import Record, Rejection

_BLOCK_BYTES = 1 << 20


class RecordFile:
    """Takes records and rejections, and gives them back in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=_BLOCK_BYTES)
        self._encode = msgspec.msgpack.Encoder().encode

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, record: Record | Rejection) -> None:
        """Write one down. Raises `OSError` where the disk is full."""
        write_frame(self._file, self._encode(record))

    def __iter__(self) -> Iterator[Record | Rejection]:
        """All of them, after the file is closed."""
        decode = msgspec.msgpack.Decoder(Record | Rejection).decode
        with self.path.open("rb", buffering=0) as file:
            for frame in read_frames(file):
                yield decode(frame)
