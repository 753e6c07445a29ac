"""Which rank holds up the others: judged from what is seen of their heartbeats, never from their clocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mellow_ds.monitor.heartbeat import ENDED, Beat, describe_work, read_beat
from mellow_ds.monitor.process_id import State

_SILENT_INTERVALS = 2.5  # beats that a rank may miss before it counts as silent
_NOT_BEGUN = (-1, 0)


@dataclass
class Seen:
    """What an observer has seen of one rank; times are on the observer's own clock."""

    rank: int
    beat: Beat | None  # None: there is no heartbeat to be read
    progress_at: float  # when its progress was last seen to change
    beat_at: float  # when its heartbeat was last seen to change
    state: State = "unknown"

    def is_silent(self, now: float) -> bool:
        """Whether the process itself does not go on (stopped, gone, cut off), whatever its training thread does."""
        if self.beat is None:
            return True
        if self.beat.phase == ENDED:
            return False
        if self.state in ("gone", "stopped"):
            return True
        return now - self.beat_at > _SILENT_INTERVALS * self.beat.interval_seconds + 0.5

    @property
    def grace_seconds(self) -> float:
        """What its phase may take beyond train.hang_seconds."""
        return 0.0 if self.beat is None else self.beat.grace_seconds

    def progress_of(self) -> tuple[int, int]:
        """How far it is, to be compared with others."""
        return _NOT_BEGUN if self.beat is None else self.beat.place


class Observer:
    """Looks at the heartbeats of all ranks, again and again."""

    def __init__(self, folder: Path, ranks: Iterable[int], since: float, began: float) -> None:
        """`since`: when the observer itself stood still; nobody is taken to have stood still for longer. `began`: now.

        Both on the clock that `look` is told the time of.
        """
        self.began = began
        self._folder = folder
        self._seen = {rank: Seen(rank, None, since, since) for rank in ranks}

    def look(self, now: float) -> list[Seen]:
        """Read all heartbeats; what changed since the last look, changed now."""
        for seen in self._seen.values():
            beat = read_beat(self._folder, seen.rank)
            if beat is None:
                continue  # torn for a moment, or not there: then it was never read
            if seen.beat is not None and beat.progress != seen.beat.progress:
                seen.progress_at = now
            if seen.beat is None or beat.beats != seen.beat.beats:
                seen.beat_at = now
            seen.beat = beat
            seen.state = beat.process.state()
        return list(self._seen.values())


def still_since(ranks: Sequence[Seen], now: float) -> float:
    """From when on no rank has got further; later where a rank is in a phase that may take long.

    Where a process does not go on, nothing that the others do takes long for good reason.
    """
    any_silent = any(rank.is_silent(now) for rank in ranks)
    return max(rank.progress_at + (0.0 if any_silent else rank.grace_seconds) for rank in ranks)


def find_behind(ranks: list[Seen], now: float) -> Seen | None:
    """The rank that the others wait for; None where all stand at the same place.

    A process that does not go on comes before one whose training thread does not; then the one that has come least
    far; then, at equal places, one that is in no collective: those that are wait for it.
    """

    def order(rank: Seen) -> tuple[bool, tuple[int, int], bool]:
        waits = rank.beat is not None and rank.beat.waits
        return not rank.is_silent(now), rank.progress_of(), waits

    working = [rank for rank in ranks if rank.beat is None or rank.beat.phase != ENDED]
    if not working:
        return None
    first = min(working, key=order)
    if len(ranks) > 1 and all(order(rank) == order(first) for rank in ranks):
        return None
    return first


def describe_standstill(ranks: list[Seen], behind: Seen | None, now: float, hang_seconds: float, folder: Path) -> str:
    """The one line that a person reads first."""
    cause = f"no progress for {hang_seconds:g} s (train.hang_seconds): "
    stacks = f"; stack traces of all ranks are in {folder}"
    if behind is None:
        one = ranks[0].beat
        where = f"all {len(ranks)} ranks are in {describe_work(one._replace(num_examples=0))}" if one else "no rank is"
        return f"{cause}{where}, none behind the others{stacks}"
    name = f"rank {behind.rank}"
    if behind.beat is None:
        return f"{cause}{name} is behind: it has left no heartbeat{stacks}"
    beat = behind.beat
    line = f"{cause}{name} ({beat.process}) " + ("is behind: it " if len(ranks) > 1 else "")
    line += _doing(behind, now) + f" {describe_work(beat)}"
    if not behind.is_silent(now) and beat.where:
        line += f", at {beat.where}"
    return line + stacks


def _doing(rank: Seen, now: float) -> str:
    assert rank.beat is not None
    if rank.state == "stopped":
        return "is stopped (by a signal such as SIGSTOP), last seen in"
    if rank.state == "gone":
        return "was killed, last seen in"
    if rank.is_silent(now):
        return "gives no sign of life, last seen in"
    return "stands in"
