"""Which clips go into which shard: a pure function of sizes and of the questions about several clips. Reads nothing.

A clip has one home shard, where its questions stand. A question stands with its first clip, and its other clips must be
in the same shard, so a clip whose home is elsewhere is copied there. A shard is grown along the graph of these pairs:
next comes the clip that adds the fewest bytes of copies, until the shard is full. Components of the graph are taken in
the order of their smallest key, a hash, which mixes data sets and classes over the shards.
"""

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

_FULL_ENOUGH = 0.75  # a shard may be closed here rather than cut a component in two


@dataclass(frozen=True)
class Placement:
    """Clips by shard."""

    shards: tuple[tuple[str, ...], ...]  # keys in each shard, copies included, sorted
    home: dict[str, int]  # key: number of the shard where its questions stand

    @property
    def replication(self) -> float:
        """Stored clips a clip."""
        return sum(map(len, self.shards)) / max(len(self.home), 1)


def place_clips(clip_bytes: Mapping[str, int], partners: Mapping[str, Collection[str]], shard_bytes: int) -> Placement:
    """Place every clip of `clip_bytes` (key: bytes in a shard) into shards of about `shard_bytes`.

    `partners[key]` are the other clips of the questions that stand with `key`. A shard is larger than `shard_bytes`
    only where one clip with its partners is.
    """
    graph = _Graph(clip_bytes, partners)
    home: dict[str, int] = {}
    shards = [_Shard(graph, home, 0)]
    for component in graph.components():
        if shards[-1].better_closed(sum(clip_bytes[key] for key in component), shard_bytes):
            shards.append(_Shard(graph, home, len(shards)))
        for seed in component:
            key = None if seed in home else seed
            while key is not None:
                if shards[-1].keys and shards[-1].bytes + shards[-1].cost(key) > shard_bytes:
                    shards.append(_Shard(graph, home, len(shards)))
                shards[-1].take(key)
                key = shards[-1].next_clip()
    return Placement(tuple(tuple(sorted(shard.keys)) for shard in shards if shard.keys), home)


class _Graph:
    """The clips and who asks about whom."""

    def __init__(self, clip_bytes: Mapping[str, int], partners: Mapping[str, Collection[str]]) -> None:
        self.bytes = clip_bytes
        self.partners = {key: sorted(set(others) - {key}) for key, others in partners.items()}
        self.askers: dict[str, list[str]] = {}
        for key in sorted(self.partners):
            for other in self.partners[key]:
                self.askers.setdefault(other, []).append(key)

    def neighbours(self, key: str) -> list[str]:
        return [*self.partners.get(key, ()), *self.askers.get(key, ())]

    def components(self) -> Iterator[list[str]]:
        """Connected components in the order of their smallest key, each breadth first from there."""
        seen: set[str] = set()
        for start in sorted(self.bytes):
            if start in seen:
                continue
            seen.add(start)
            component = [start]
            for key in component:  # grows while it is walked
                for other in self.neighbours(key):
                    if other not in seen:
                        seen.add(other)
                        component.append(other)
            yield component


@dataclass
class _Shard:
    """A shard that is being filled, and the clips that are linked with what it holds."""

    graph: _Graph
    home: dict[str, int]
    number: int
    keys: set[str] = field(default_factory=set)  # own clips and copies
    bytes: int = 0
    _linked: list[tuple[int, str]] = field(default_factory=list)  # heap of (bytes that it costs beyond its own, key)

    def better_closed(self, component_bytes: int, shard_bytes: int) -> bool:
        """Whether a component should open a new shard, because it fits into one but no longer into this."""
        return (
            component_bytes <= shard_bytes < self.bytes + component_bytes and self.bytes >= _FULL_ENOUGH * shard_bytes
        )

    def cost(self, key: str) -> int:
        """Bytes that the shard grows by when it becomes the home of `key`."""
        newcomers = (key, *self.graph.partners.get(key, ()))
        return sum(self.graph.bytes[other] for other in newcomers if other not in self.keys)

    def take(self, key: str) -> None:
        """Become the home of `key`."""
        self.home[key] = self.number
        self.bytes += self.cost(key)
        for newcomer in (key, *self.graph.partners.get(key, ())):
            if newcomer not in self.keys:
                self.keys.add(newcomer)
                for other in (newcomer, *self.graph.askers.get(newcomer, ())):
                    if other not in self.home:
                        heapq.heappush(self._linked, (self.cost(other) - self.graph.bytes[other], other))

    def next_clip(self) -> str | None:
        """The linked clip without a home that costs least; None where there is none."""
        # costs only fall while the shard fills, so the newest entry of a clip comes first and older ones find it placed
        while self._linked:
            key = heapq.heappop(self._linked)[1]
            if key not in self.home:
                return key
        return None
