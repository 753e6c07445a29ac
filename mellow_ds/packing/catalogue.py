"""The audio files that records name, on disk: a number for each path, and what is wrong with those that are bad.

An SQLite table, because a build must hold no text for each file in memory. It is scratch and goes with the build.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from mellow_ds.packing.decode import BadClip

_CACHED_PATHS = 1 << 15  # numbers of paths kept at hand: neighbouring records ask about the same files
_CACHE_KIBIBYTES = 16_384  # of SQLite


class Catalogue:
    """Paths below the audio root and their numbers, which count from 0 in the order of their coming."""

    def __init__(self, path: Path | None) -> None:
        """Keep the table in the file `path`, replaced; None: in a temporary file of SQLite's, made when it is large."""
        self._size = 0
        with _as_os_errors():
            if path is not None:
                path.unlink(missing_ok=True)
            # one process has the file, so no locks, which some network file systems do not know
            name = f"{path.resolve().as_uri()}?nolock=1" if path is not None else ""
            self._tables = sqlite3.connect(name, uri=path is not None, isolation_level=None)
            for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIBIBYTES}"):
                self._tables.execute(f"PRAGMA {setting}")
            self._tables.execute("CREATE TABLE file (number INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE)")
            self._tables.execute("CREATE TABLE bad (number INTEGER PRIMARY KEY, reason TEXT, detail TEXT)")
            self._tables.execute("BEGIN")
        self.number_of = lru_cache(_CACHED_PATHS)(self._number_of)

    def __enter__(self) -> "Catalogue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tables.close()

    def __len__(self) -> int:
        return self._size

    def _number_of(self, path: str) -> int:
        """The number of a path, which is added where it is new. Raises `OSError` where the disk is full."""
        with _as_os_errors():
            row = self._tables.execute("SELECT number FROM file WHERE path = ?", (path,)).fetchone()
            if row is not None:
                return int(row[0])
            self._tables.execute("INSERT INTO file VALUES (?, ?)", (self._size, path))
        self._size += 1
        return self._size - 1

    def path_of(self, number: int) -> str:
        """The path of a number."""
        with _as_os_errors():
            return str(self._tables.execute("SELECT path FROM file WHERE number = ?", (int(number),)).fetchone()[0])

    def in_order(self) -> Iterator[tuple[int, str]]:
        """(number, path) of all, in alphabetical order."""
        with _as_os_errors():
            yield from self._tables.execute("SELECT number, path FROM file ORDER BY path")

    def note_fault(self, number: int, fault: BadClip) -> None:
        """Keep what is wrong with a file."""
        with _as_os_errors():
            row = (number, fault.reason, fault.detail)
            self._tables.execute("INSERT OR REPLACE INTO bad VALUES (?, ?, ?)", row)

    def fault_of(self, number: int) -> BadClip | None:
        """What is wrong with a file, where `note_fault` was called for it."""
        with _as_os_errors():
            row = self._tables.execute("SELECT reason, detail FROM bad WHERE number = ?", (int(number),)).fetchone()
        return BadClip(*row) if row is not None else None


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """SQLite's errors as those that writing a file raises."""
    try:
        yield
    except sqlite3.Error as error:
        number = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(number, f"the list of audio files: {error}") from None
