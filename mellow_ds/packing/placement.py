"""Which clips go into which shard: a pure function of sizes and of the questions about several clips. Reads nothing.

A clip has one home shard, where its questions stand. A question stands with its first clip, and its other clips must be
in the same shard, so a clip whose home is elsewhere is copied there. A shard is grown along the graph of these pairs:
next comes the clip that adds the fewest bytes of copies, until the shard is full. Components of the graph are taken in
the order of their smallest key, a hash, which mixes data sets and classes over the shards.

Clips are numbers here, from 0 in the order of their keys: some 40 bytes of memory for each, and 16 for each pair.
"""

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_FULL_ENOUGH = 0.75  # a shard may be closed here rather than cut a component in two
_NOWHERE = -1
_NUMBER_BITS = 32  # of a clip, below its cost in an entry of the heap


@dataclass(frozen=True)
class Placement:
    """Clips by shard."""

    shards: tuple[np.ndarray, ...]  # int32 numbers of the clips in each shard, copies included, ascending
    home: np.ndarray  # [num_clips] int32: the shard where the clip's questions stand; -1: it is in none

    @property
    def replication(self) -> float:
        """Stored clips a clip."""
        return sum(map(len, self.shards)) / max(int((self.home != _NOWHERE).sum()), 1)


class Pairs:
    """Who is asked about together: for each clip, the others of the questions that stand with it, each once."""

    def __init__(self, num_clips: int) -> None:
        self._starts = array("q", bytes(8 * (num_clips + 1)))
        self._others = array("i")
        self._last = -1  # clip whose partners were added last

    @classmethod
    def from_sorted(cls, num_clips: int, firsts: np.ndarray, others: np.ndarray) -> "Pairs":
        """Of two arrays [num_pairs] that are sorted by first clip, then by other, each pair once."""
        pairs = cls(0)
        apart = firsts != others
        counts = np.bincount(firsts[apart], minlength=num_clips)
        pairs._starts = array("q", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).tobytes())
        pairs._others = array("i", others[apart].astype(np.int32).tobytes())
        return pairs

    def add(self, clip: int, others: Sequence[int]) -> None:
        """Take in the partners of a clip, each once, ascending; clips must come in ascending order."""
        for skipped in range(self._last + 1, clip + 1):
            self._starts[skipped] = len(self._others)
        self._others.extend(other for other in others if other != clip)
        self._last = clip

    def finish(self) -> None:
        """Say that no clip follows."""
        for skipped in range(self._last + 1, len(self._starts)):
            self._starts[skipped] = len(self._others)

    def of(self, clip: int) -> array:
        """The partners of a clip, ascending."""
        return self._others[self._starts[clip] : self._starts[clip + 1]]

    def turned(self) -> "Pairs":
        """Who asks about each clip."""
        others = np.frombuffer(self._others, dtype=np.int32)
        num_clips = len(self._starts) - 1
        order = np.argsort(others, kind="stable")
        starts = np.array(self._starts, np.int64)
        firsts = np.repeat(np.arange(num_clips, dtype=np.int32), starts[1:] - starts[:-1])
        return Pairs.from_sorted(num_clips, others[order], firsts[order])


def place_clips(clip_bytes: np.ndarray, partners: Pairs, shard_bytes: int) -> Placement:
    """Place the clips of `clip_bytes` ([num_clips], bytes in a shard; 0: not to be placed) into shards.

    A shard has about `shard_bytes`, and more only where one clip with its partners has.
    """
    graph = _Graph(clip_bytes, partners)
    home = array("i", [_NOWHERE]) * len(clip_bytes)
    shards: list[np.ndarray] = []
    shard = _Shard(graph, home, 0)

    def close() -> "_Shard":
        shards.append(shard.content())
        return _Shard(graph, home, len(shards))

    for component in graph.components():
        if shard.better_closed(sum(map(graph.bytes.__getitem__, component)), shard_bytes):
            shard = close()
        for seed in component:
            clip = None if home[seed] != _NOWHERE else seed
            while clip is not None:
                if shard.clips and shard.bytes + shard.cost(clip) > shard_bytes:
                    shard = close()
                shard.take(clip)
                clip = shard.next_clip()
    if shard.clips:
        shards.append(shard.content())
    return Placement(tuple(shards), np.frombuffer(home, dtype=np.int32))


class _Graph:
    """The clips and who asks about whom."""

    def __init__(self, clip_bytes: np.ndarray, partners: Pairs) -> None:
        self.bytes = array("q", clip_bytes.astype(np.int64).tobytes())
        self.partners = partners
        self.askers = partners.turned()

    def components(self) -> Iterator[array]:
        """Connected components in the order of their smallest key, each breadth first from there."""
        seen = bytearray(len(self.bytes))
        for start, num_bytes in enumerate(self.bytes):
            if seen[start] or not num_bytes:
                continue
            seen[start] = True
            component = array("i", [start])
            for clip in component:  # grows while it is walked
                for neighbours in (self.partners.of(clip), self.askers.of(clip)):
                    for other in neighbours:
                        if not seen[other]:
                            seen[other] = True
                            component.append(other)
            yield component


class _Shard:
    """A shard that is being filled, and the clips that are linked with what it holds."""

    def __init__(self, graph: _Graph, home: array, number: int) -> None:
        self._graph, self._home, self._number = graph, home, number
        self.clips: set[int] = set()  # own clips and copies
        self.bytes = 0
        self._extra: dict[int, int] = {}  # bytes that a linked clip costs beyond its own
        self._linked: list[int] = []  # heap of bytes that a clip costs beyond its own, and below them its number

    def content(self) -> np.ndarray:
        """The clips, ascending."""
        return np.array(sorted(self.clips), np.int32)

    def better_closed(self, component_bytes: int, shard_bytes: int) -> bool:
        """Whether a component should open a new shard, because it fits into one but no longer into this."""
        return (
            component_bytes <= shard_bytes < self.bytes + component_bytes and self.bytes >= _FULL_ENOUGH * shard_bytes
        )

    def cost(self, clip: int) -> int:
        """Bytes that the shard grows by when it becomes the home of `clip`."""
        sizes, clips = self._graph.bytes, self.clips
        own = 0 if clip in clips else sizes[clip]
        return own + sum(sizes[other] for other in self._graph.partners.of(clip) if other not in clips)

    def take(self, clip: int) -> None:
        """Become the home of `clip`."""
        self._home[clip] = self._number
        self.bytes += self.cost(clip)
        for newcomer in (clip, *self._graph.partners.of(clip)):
            if newcomer not in self.clips:
                self.clips.add(newcomer)
                for other in (newcomer, *self._graph.askers.of(newcomer)):
                    if self._home[other] == _NOWHERE:
                        heapq.heappush(self._linked, (self._cheapened(other, newcomer) << _NUMBER_BITS) + other)

    def _cheapened(self, clip: int, newcomer: int) -> int:
        """Bytes that a linked clip costs beyond its own, now that `newcomer`, which it needs, has come."""
        sizes = self._graph.bytes
        # kept up to date rather than summed anew: where each clip has many partners, sums take minutes
        extra = self._extra[clip] - sizes[newcomer] if clip in self._extra else self.cost(clip) - sizes[clip]
        self._extra[clip] = extra
        return extra

    def next_clip(self) -> int | None:
        """The linked clip without a home that costs least; None where there is none."""
        # costs only fall while the shard fills, so the newest entry of a clip comes first and older ones find it placed
        while self._linked:
            clip = heapq.heappop(self._linked) & ((1 << _NUMBER_BITS) - 1)
            if self._home[clip] == _NOWHERE:
                return clip
        return None
