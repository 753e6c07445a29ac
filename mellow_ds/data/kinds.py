"""Kinds of examples that a training run reports its loss by: the shard set of a mixture and the subtype."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mellow_ds.config.schema import DataConfig
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import ShardError


@dataclass(frozen=True)
class Kinds:
    """Numbers for the pairs (set, subtype)."""

    sets: tuple[str, ...]  # names; one without a name where there is no mixture
    first_shards: tuple[int, ...]  # of each set among the shards of the run
    subtypes: tuple[str, ...]  # sorted

    @property
    def num_kinds(self) -> int:
        """Pairs, those that never come up included."""
        return len(self.sets) * len(self.subtypes)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.subtypes)}

    def number(self, shard: int, subtype: str) -> int:
        """The kind of an example in a shard of the run; raises `ShardError` for a subtype that no manifest names."""
        if subtype not in self._numbers:
            raise ShardError(f"a question has the subtype '{subtype}', which no manifest names: build the shards anew")
        return (bisect_right(self.first_shards, shard) - 1) * len(self.subtypes) + self._numbers[subtype]

    def sums(self, totals: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Totals by kind added up by name: `subtype/NAME`, and `set/NAME` where there are several sets."""
        found: dict[str, tuple[float, float]] = {}
        for number, pair in enumerate(totals):
            part, subtype = divmod(number, len(self.subtypes))
            names = [f"subtype/{self.subtypes[subtype] or 'none'}"]
            if len(self.sets) > 1:
                names.append(f"set/{self.sets[part]}")
            for name in names:
                before = found.get(name, (0.0, 0.0))
                found[name] = (before[0] + pair[0], before[1] + pair[1])
        return found


def kinds_from_config(reader: ShardReader, data: DataConfig) -> Kinds:
    """The kinds of a run whose `reader` reads data.train_shards."""
    sizes = [len(manifest.shards) for manifest in reader.manifests]
    subtypes = tuple(sorted(reader.subtypes))
    if not data.mixture:
        return Kinds(("",), (0,), subtypes)
    firsts, folder = [], 0
    for part in data.mixture:
        firsts.append(sum(sizes[:folder]))
        folder += len(part.shards)
    return Kinds(tuple(part.label for part in data.mixture), tuple(firsts), subtypes)
