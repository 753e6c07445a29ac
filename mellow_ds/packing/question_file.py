"""The questions of a build in one file, a clip's together: written once, then read clip by clip by whoever packs it.

Scratch of one build, so its form is nobody else's: msgpack in frames.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from mellow_ds.packing.frames import read_frames, write_frame
from mellow_ds.shard_format import Question

_BLOCK_BYTES = 1 << 20


class StoredQuestion(msgspec.Struct, array_like=True, frozen=True):
    """A question, and the record that it came from."""

    file: int  # which of the JSON files
    number: int  # position in that file
    paths: tuple[int, ...]  # numbers of the audio files, one a clip
    id: str
    clips: tuple[str, ...]  # keys
    input: str
    answer: str
    subtype: str
    taskname: str
    captions: tuple[str, ...]

    @property
    def question(self) -> Question:
        """As a shard holds it."""
        return Question(self.id, self.clips, self.input, self.answer, self.subtype, self.taskname, self.captions)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StoredQuestion)


class QuestionWriter:
    """Writes the questions of clips 0 to `num_clips` - 1, clip by clip in any order; knows where each clip's are."""

    def __init__(self, path: Path, num_clips: int) -> None:
        self.path = path
        self._offsets, self._sizes = array("Q", bytes(8 * num_clips)), array("Q", bytes(8 * num_clips))
        self._end = 0
        self._file = path.open("wb", buffering=_BLOCK_BYTES)

    def __enter__(self) -> "QuestionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, clip: int, question: StoredQuestion) -> None:
        """Write a question of a clip; those of a clip come one after the other. Raises `OSError`."""
        if not self._sizes[clip]:
            self._offsets[clip] = self._end
        num_bytes = write_frame(self._file, _ENCODER.encode(question))
        self._sizes[clip] += num_bytes
        self._end += num_bytes

    def span(self, clip: int) -> tuple[int, int]:
        """(offset, number of bytes) of the questions of a clip; 0 bytes where there are none."""
        return self._offsets[clip], self._sizes[clip]


def read_questions(file: BinaryIO, span: tuple[int, int]) -> Iterator[StoredQuestion]:
    """The questions of a clip, from the file opened without a buffer; no other may be read meanwhile."""
    offset, num_bytes = span
    if num_bytes:
        file.seek(offset)
        for frame in read_frames(file, num_bytes):
            yield _DECODER.decode(frame)
