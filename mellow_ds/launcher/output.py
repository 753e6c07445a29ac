"""What a run says: each rank's lines with its name before them, and in a file of its own.

A terminal that does not take lines (Ctrl-S, a pager) or a file system that hangs must not stop the launcher, whose
beats keep the run alive: a thread prints, another one writes the files, and what they cannot take in time is counted.
"""

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Generic, TypeVar

from mellow_ds.errors import ConfigError
from mellow_ds.launcher.plan import LaunchPlan

LAST_LINES = 20  # of the rank that failed first, shown in the end
_MAX_WAITING_LINES = 20_000
Item = TypeVar("Item")
_CLOSING_SECONDS = 5.0
_SAID_BY_LAUNCHER = "mellow-ds launch: "


class _Lane(Generic[Item]):
    """Hands items to a function one after the other, in a thread, so that nobody waits for it."""

    def __init__(self, name: str, take: Callable[[Item], None]) -> None:
        self.num_dropped = 0  # that found no place since somebody set it to 0
        self._take = take
        self._items: queue.Queue[Item | None] = queue.Queue(_MAX_WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_empty(self) -> bool:
        return self._items.empty()

    def put(self, item: Item) -> None:
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Hand on what waits, if that takes no longer than `_CLOSING_SECONDS`."""
        try:
            self._items.put(None, timeout=_CLOSING_SECONDS)
        except queue.Full:
            return
        self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._take(item)


class Output:
    """Prints and files the lines of all ranks, from one attempt to the next."""

    def __init__(self, log_folder: Path | None) -> None:
        """`log_folder`: for rank-N.log of each rank; None: no files."""
        self.last_lines: dict[int, deque[str]] = {}
        self._prefixes: dict[int, str] = {}
        self._files: dict[int, IO[str]] = {}
        self._folder = log_folder
        self._printer: _Lane[tuple[IO[str], str]] = _Lane("printer", self._print)
        self._writer: _Lane[tuple[IO[str], int, str | None]] = _Lane("log writer", self._write)  # None: the file's end

    def begin(self, plan: LaunchPlan, attempt: int = 1) -> None:
        """The ranks of an attempt; its lines are added to the files of the attempts and starts before."""
        self.last_lines = {rank: deque[str](maxlen=LAST_LINES) for host in plan.hosts for rank in host.ranks}
        self._prefixes = {
            rank: f"[{host.name} rank {rank}] " if len(plan.hosts) > 1 or attempt > 1 else f"[rank {rank}] "
            for host in plan.hosts
            for rank in host.ranks
        }
        self._close_files()
        if self._folder is not None:
            self._open(self._folder, plan, attempt)

    def _open(self, folder: Path, plan: LaunchPlan, attempt: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank in self._prefixes:
                self._files[rank] = self.file(rank).open("a", encoding="utf-8", buffering=1)
                place = f"attempt {attempt}, on {plan.host_of(rank).name}, {plan.num_ranks} ranks"
                self._files[rank].write(f"-- started {time.strftime('%Y-%m-%d %H:%M:%S')}, {place}\n")
        except OSError as error:
            raise ConfigError(f"the log folder {folder} cannot be written ({error}): give another --log-dir") from None

    def file(self, rank: int) -> Path:
        """The log of a rank."""
        assert self._folder is not None
        return self._folder / f"rank-{rank}.log"

    def where(self, rank: int) -> str:
        """Words that name a rank's log."""
        return f"its log is {self.file(rank)}" if self._folder is not None else "it has no log: no --log-dir"

    def rank_line(self, rank: int, stream: int, text: str) -> None:
        """A line of a rank's standard output (1) or error (2)."""
        self.last_lines[rank].append(text)
        self._put(sys.stdout if stream == 1 else sys.stderr, self._prefixes[rank] + text)
        file = self._files.get(rank)
        if file is not None:
            self._writer.put((file, rank, text))

    def host_line(self, host: str, text: str) -> None:
        """A line of a host's shell or of ssh."""
        self._put(sys.stderr, f"[{host}] {text}")

    def note(self, text: str) -> None:
        """A line of the launcher itself."""
        self._put(sys.stderr, _SAID_BY_LAUNCHER + text)

    def error(self, text: str) -> None:
        """What the run came to."""
        self._put(sys.stderr, f"error: {text}")

    def errors(self, rank: int) -> list[str]:
        """Those of a rank's last lines that tell of an error."""
        return [line for line in self.last_lines[rank] if line.startswith("error: ")]

    def repeat(self, rank: int) -> None:
        """Show the last lines of a rank again."""
        for text in list(self.last_lines[rank]):
            self._put(sys.stderr, self._prefixes[rank] + text)

    def close(self) -> None:
        """Print what waits and close the files."""
        self._close_files()
        self._writer.close()
        if self._writer.num_dropped:
            self.note(f"{self._writer.num_dropped} lines are not in the log files: {self._folder} did not take them")
        self._printer.close()

    def _close_files(self) -> None:
        for rank, file in self._files.items():
            self._writer.put((file, rank, None))
        self._files = {}

    def _write(self, item: tuple[IO[str], int, str | None]) -> None:
        file, rank, text = item
        if text is None:
            with contextlib.suppress(OSError):  # a full disk has been told of
                file.close()
            return
        try:
            file.write(text + "\n")
        except (OSError, ValueError) as error:
            if self._files.pop(rank, None) is not None:  # the run does not end for its log
                self.note(f"{self.file(rank)} cannot be written any more: {error}")

    def _put(self, stream: IO[str], text: str) -> None:
        self._printer.put((stream, text))

    def _print(self, item: tuple[IO[str], str]) -> None:
        stream, text = item
        dropped, self._printer.num_dropped = self._printer.num_dropped, 0
        try:
            if dropped:
                print(f"{_SAID_BY_LAUNCHER}{dropped} lines were not shown here", file=sys.stderr, flush=True)
            print(text, file=stream, flush=self._printer.is_empty)
        except (OSError, ValueError):
            pass  # whoever read it has gone (`| head`); the run goes on, and its files with it
