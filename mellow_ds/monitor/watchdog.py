"""A thread in each rank that ends the rank when the run stands still, or when another rank has failed.

It sees its own training thread without reading anything. Only where that stands still for a while does it look at the
others: a rank that waits for one that makes progress (which saves, or scores) waits rightly. The first rank of each
host looks; the next ones take over where it does not.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from mellow_ds.errors import EXIT_FAULT
from mellow_ds.log import append_to_log_file
from mellow_ds.monitor.endings import Ending, first_ending, tell_torchrun
from mellow_ds.monitor.heartbeat import (
    Heartbeat,
    RankHeartbeat,
    ending_of_gone,
    ending_of_lost,
    quoted,
    read_beat,
    stacks_path,
)
from mellow_ds.monitor.links import Links
from mellow_ds.monitor.process_id import descendants
from mellow_ds.monitor.stacks import dump_stacks, main_thread_lines, main_thread_place, waits_in_collective
from mellow_ds.monitor.standstill import Observer, Seen, describe_standstill, find_behind, still_since
from mellow_ds.world import World

Found = TypeVar("Found")

_TICKS_IN_LIMIT = 15  # looks at the own training thread within train.hang_seconds
_LOOK_AFTER = 0.25  # of train.hang_seconds without own progress: from then on the others are looked at
_BEATS_TO_SEE = 3  # of the others, before they are judged: each shows progress only when it beats
_SECONDS_TO_LEAVE = 5.0  # that a rank gets to end by itself once another has failed
_SECONDS_TO_SAY_WHY = 1.0  # from the end of a process on another host to what is said of it: it may have said so itself
_SECONDS_TO_END = 10.0  # that a rank which has failed itself gets to come to its end
_FILE_SECONDS = 5.0  # that a file system gets for what is read or written when the run may stand still
_SECONDS_FOR_STACKS = 2.0  # that the others get, beside a tick, to write theirs


def group_timeout_seconds(hang_seconds: float) -> float:
    """The time-out of collectives that is always later than the watchdogs: it names no rank.

    Ten minutes at least: ranks compile, and wait for the one that reads a checkpoint through. Without a watchdog
    (`hang_seconds` 0) a day.
    """
    if not hang_seconds:
        return 86_400.0
    last_watchdog = hang_seconds * (1 + 2 * _LOOK_AFTER)
    return max(600.0, last_watchdog + 60.0)


class Watchdog:
    """Watches one rank's heartbeat and, where that stands still, those of the others."""

    def __init__(self, heartbeat: RankHeartbeat, hang_seconds: float, links: Links) -> None:
        """`hang_seconds` 0: a standstill is nobody's concern; failures of other ranks are."""
        self._heartbeat = heartbeat
        self._links = links
        self._world = heartbeat.world
        self._hang_seconds = hang_seconds
        tick = heartbeat.interval_seconds
        self._tick_seconds = min(tick, hang_seconds / _TICKS_IN_LIMIT) if hang_seconds else tick
        self._clock = 0.0  # seconds in which this thread ran: a process that was suspended has not stood still
        self._progress = -1
        self._progress_at = 0.0
        self._observer: Observer | None = None
        self._files = _Patience(_FILE_SECONDS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; waits for nothing."""
        self._stopping.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(self._tick_seconds):
            now = time.monotonic()
            self._clock += min(now - last, 2 * self._tick_seconds)
            last = now
            first = self._files.ask(self._find_ending) or self._find_loss()
            if first is not None:
                self._leave(first)
            elif self._hang_seconds:
                self._look_at_progress()

    def _find_ending(self) -> Ending | None:
        """What the run ends of, if it does. Under NCCL a killed rank would be noticed by nobody else."""
        first = first_ending(self._heartbeat.folder)
        gone = self._heartbeat.gone_neighbour() if first is None else None
        if gone is None or self._stopping.is_set():
            return first
        first = first_ending(self._heartbeat.folder)  # a rank says why before it goes
        if first is None:
            first = ending_of_gone(gone.rank, gone)
            self._heartbeat.add_ending(first)
        return first

    def _find_loss(self) -> Ending | None:
        """What is said of a rank of another host that is gone, also where the run folder is gone with it."""
        loss = self._links.loss
        if loss is None or not (loss.is_host or time.monotonic() - loss.at > _SECONDS_TO_SAY_WHY):
            return None
        folder = self._heartbeat.folder
        beat = self._files.ask(lambda: read_beat(folder, loss.rank))
        found = (ending_of_lost if loss.is_host else ending_of_gone)(loss.rank, beat)
        self._files.ask(lambda: self._heartbeat.add_ending(found))
        return self._files.ask(lambda: first_ending(folder)) or found

    def _look_at_progress(self) -> None:
        progress = self._heartbeat.work.progress
        if progress != self._progress:
            self._progress, self._progress_at, self._observer = progress, self._clock, None
            self._heartbeat.stands_at = ("", False)
            return
        still_seconds = self._clock - self._progress_at
        if still_seconds < self._hang_seconds * _LOOK_AFTER:
            return
        self._heartbeat.stands_at = (main_thread_place(), waits_in_collective())
        # the first rank of a host speaks at the limit, another one only where it has not
        is_first = self._world.local_rank == 0
        if not is_first and still_seconds < self._hang_seconds:
            return
        if self._observer is None:
            self._observer = Observer(self._heartbeat.folder, range(self._world.size), self._progress_at, self._clock)
        observer, clock = self._observer, self._clock
        seen = self._files.ask(lambda: observer.look(clock))
        if seen is None:
            since = self._progress_at + self._heartbeat.work.grace_seconds
        else:
            since = max(self._progress_at, still_since(seen, clock))
        has_seen = clock - observer.began >= _BEATS_TO_SEE * self._heartbeat.interval_seconds
        if has_seen and clock - since >= self._hang_seconds * (1 if is_first else 1 + _LOOK_AFTER):
            self._say_standstill(seen)

    def _say_standstill(self, seen: list[Seen] | None) -> NoReturn:
        """The run stands still: say so where nobody has, and end."""
        folder, rank = self._heartbeat.folder, self._world.rank
        if seen is None:  # the file system hangs, and with it most likely the run
            own = Seen(rank, self._heartbeat.now(), self._progress_at, self._clock, "runs")
            line = describe_standstill([own], own, self._clock, self._hang_seconds, folder)
            self._end_still(Ending(rank, f"{line}; {folder} cannot be read", EXIT_FAULT, "hang"), None)
        behind = find_behind(seen, self._clock)
        line = describe_standstill(seen, behind, self._clock, self._hang_seconds, folder)
        own_word = Ending(rank, line, EXIT_FAULT, "hang")
        self._files.ask(lambda: self._heartbeat.add_ending(own_word))
        first = self._files.ask(lambda: first_ending(folder)) or own_word
        is_silent = behind is not None and behind.rank != rank and behind.is_silent(self._clock)
        self._end_still(first, behind if is_silent else None)

    def _leave(self, first: Ending) -> None:
        """Another rank has failed, or found the run standing still: end too, quoting it."""
        if first.kind == "hang":
            self._end_still(first, None)
        is_own = first.rank == self._world.rank
        if is_own and self._world.size == 1:
            self._stopping.set()
            return
        # the training thread notices most failures by itself, and then ends in order; stopped: it has
        seconds = _SECONDS_TO_END if is_own else _SECONDS_TO_LEAVE
        if first.kind == "lost":  # which it does not
            seconds = 0.0
        if self._stopping.wait(seconds):
            return
        if not is_own and not self._heartbeat.has_failed:
            self._say(f"error: rank {self._world.rank}: {quoted(first)}")
        _end(first.exit_code)

    def _end_still(self, first: Ending, silent: Seen | None) -> NoReturn:
        """Print the line where it is this rank's, say where this rank stands, end those that cannot, and end."""
        rank = self._world.rank
        if first.rank == rank:
            tell_torchrun(first.message, os.environ.get("TORCHELASTIC_ERROR_FILE"))
            self._say(f"error: {first.message}")
        else:
            self._files.ask(lambda: append_to_log_file(f"error: {first.message}"))
        lines = main_thread_lines()
        self._files.ask(lambda: dump_stacks(stacks_path(self._heartbeat.folder, rank)))
        self._say("\n".join([f"rank {rank} stands at (innermost call last):", *(f"  {line}" for line in lines)]))
        time.sleep(_SECONDS_FOR_STACKS + self._tick_seconds)
        processes = [*(self._files.ask(self._heartbeat.neighbours) or {}).values(), *descendants(os.getpid())]
        unable = [process for process in processes if process.state() == "stopped"]
        if silent is not None and silent.beat is not None:
            unable.append(silent.beat.process)
        for process in unable:  # to end by themselves; a launcher, where there is one, would take half a minute
            process.kill()
        _end(first.exit_code)

    def _say(self, text: str) -> None:
        """To stderr, past its buffer and its lock, which the training thread may hold, and to the log of the run."""
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))
        self._files.ask(lambda: append_to_log_file(text))


class WatchedHeartbeat(RankHeartbeat):
    """A rank's heartbeat with its watchdog."""

    def __init__(self, folder: Path, world: World, hang_seconds: float, links: Links) -> None:
        super().__init__(folder, world)
        self._links = links
        self._watchdog = Watchdog(self, hang_seconds, links)
        self.start()
        self._watchdog.start()

    def close(self) -> None:
        """See `Heartbeat.close`. The watchdog of a rank that failed stays: it sees to it that the process ends."""
        super().close()
        if not self.has_failed or self.world.size == 1:
            self._links.close()
            self._watchdog.stop()


def open_heartbeat(folder: Path, world: World, hang_seconds: float, links: Links | None = None) -> Heartbeat:
    """The heartbeat of this rank in `folder` (RUN/heartbeats, made by `make_heartbeats` before any rank is here).

    `hang_seconds`: without progress on any rank, after which the run says which rank is behind, and ends; 0: never.
    `links`: those of this rank to other hosts, which have met.
    """
    return WatchedHeartbeat(folder, world, hang_seconds, links or Links())


class _Patience:
    """Asks what may hang (a file system) in a thread of its own, and goes on without an answer after a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked: threading.Thread | None = None

    def ask(self, question: Callable[[], Found]) -> Found | None:
        """The answer; None where there is none in time, or where the last question is not answered yet."""
        if self._asked is not None and self._asked.is_alive():
            return None
        answers: list[Found] = []
        self._asked = threading.Thread(target=lambda: answers.append(question()), daemon=True)
        self._asked.start()
        self._asked.join(self._seconds)
        return answers[0] if answers else None


def _end(exit_code: int) -> NoReturn:
    """End the process without waiting for anybody."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(exit_code)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
