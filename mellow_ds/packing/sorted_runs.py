"""Sort more than memory holds: byte strings go in in any order and come out sorted, from sorted runs on disk.

What fits into one run never touches the disk. The files are scratch: nothing here survives the process on purpose.
"""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from mellow_ds.packing.frames import read_frames, write_frame

_RUN_BYTES = 16 << 20  # of items in memory, their Python objects included
_ITEM_OVERHEAD = 41  # bytes of memory that a bytes object takes beside its content, with its place in a list
_MOST_RUNS = 32  # of like size, before they are merged into one: as many files are read at once
_BLOCK_BYTES = 1 << 17


class SortedRuns:
    """Byte strings in order; equal ones are all kept."""

    def __init__(self, folder: Path, name: str, run_bytes: int = _RUN_BYTES) -> None:
        """Runs are written as `folder/name-0.part` and so on; `run_bytes` of items stay in memory."""
        self._folder, self._name, self._run_bytes = folder, name, run_bytes
        self._items: list[bytes] = []
        self._item_bytes = 0
        self._levels: list[list[Path]] = []  # runs by how often they were merged, so that sizes are alike in a level
        self._num_files = 0

    def add(self, item: bytes) -> None:
        """Take in an item of less than 4 GiB. Raises `OSError` where a run cannot be written."""
        self._items.append(item)
        self._item_bytes += len(item) + _ITEM_OVERHEAD
        if self._item_bytes >= self._run_bytes:
            self._items.sort()
            self._keep_run(0, self._items)
            self._items, self._item_bytes = [], 0

    def merged(self) -> Iterator[bytes]:
        """All items so far, sorted. More may be added afterwards, and all be asked for again."""
        self._items.sort()
        with ExitStack() as files:
            runs = [
                read_frames(files.enter_context(path.open("rb", buffering=0)))
                for level in self._levels
                for path in level
            ]
            yield from heapq.merge(*runs, self._items) if runs else self._items

    def remove(self) -> None:
        """Forget all items and remove their files."""
        for path in (path for level in self._levels for path in level):
            path.unlink(missing_ok=True)
        self._items, self._item_bytes, self._levels = [], 0, []

    def _keep_run(self, level: int, items: Iterable[bytes]) -> None:
        path = self._folder / f"{self._name}-{self._num_files}.part"
        self._num_files += 1
        with path.open("wb", buffering=_BLOCK_BYTES) as file:
            for item in items:
                write_frame(file, item)
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(path)
        if len(self._levels[level]) == _MOST_RUNS:
            self._merge_level(level)

    def _merge_level(self, level: int) -> None:
        paths, self._levels[level] = self._levels[level], []
        with ExitStack() as files:
            runs = [read_frames(files.enter_context(path.open("rb", buffering=0))) for path in paths]
            self._keep_run(level + 1, heapq.merge(*runs))
        for path in paths:
            path.unlink()
