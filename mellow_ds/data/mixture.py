"""Several shard sets in one order: each step takes its share of every set, each set stays exact and seekable.

A mixture's epoch takes a fixed number of examples of each set. Set i goes through its own epochs, one after the other,
and its share of a step follows from the step's number alone: of the first p positions of an epoch, floor(p * m_1 / M)
are of the first of the sets with m_1 of M examples, and of the others the same over what is left. Nothing is drawn, so
every stretch of positions holds a set's share to within one example for each set before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mellow_ds.config.schema import DataConfig, MixtureSet
from mellow_ds.data.order import Epochs, Order, Piece
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import ShardError

_SEED_STEP = 0x632BE5AB  # sets of equal sizes are not permuted alike


@dataclass(frozen=True)
class Mixture:
    """Orders of several shard sets, and how many examples of each an epoch of the mixture takes."""

    orders: tuple[Order, ...]
    counts: tuple[int, ...]  # by set

    @property
    def num_examples(self) -> int:
        """Examples of an epoch of the mixture."""
        return sum(self.counts)

    def pieces(self, epoch: int, first: int, last: int) -> list[Piece]:
        """The examples of each set at positions `first` to `last` (exclusive); sets in their order."""
        found = []
        for order, count, start, end in zip(
            self.orders, self.counts, self._taken(first), self._taken(last), strict=True
        ):
            found += _own_epochs(order, epoch * count + start, epoch * count + end)
        return found

    def _taken(self, position: int) -> list[int]:
        """Examples of each set among the first `position` positions of an epoch; their sum is `position`."""
        taken, left = [], self.num_examples
        for count in self.counts:
            own = position * count // left if left else 0
            taken.append(own)
            position -= own
            left -= count
        return taken


def epochs_from_config(reader: ShardReader, data: DataConfig, seed: int) -> Epochs:
    """The training order that the configuration asks for; `reader` reads data.train_shards."""
    if not data.mixture:
        return _order(reader, data, seed, 0, len(reader.num_questions))
    sizes = [len(manifest.shards) for manifest in reader.manifests]
    orders: list[Order] = []
    folder = 0
    for number, part in enumerate(data.mixture):
        first, num_shards = sum(sizes[:folder]), sum(sizes[folder : folder + len(part.shards)])
        orders.append(_order(reader, data, seed + number * _SEED_STEP, first, num_shards))
        if not orders[-1].num_examples:
            raise ShardError(f"the shards of the set {part.label} in data.mixture hold no questions: leave the set out")
        folder += len(part.shards)
    return Mixture(tuple(orders), epoch_counts(data.mixture, [order.num_examples for order in orders]))


def epoch_counts(sets: Sequence[MixtureSet], sizes: Sequence[int]) -> tuple[int, ...]:
    """Examples that an epoch of the mixture takes of each set, which has `sizes` examples; at least one of each.

    By `epochs`: so many times its size. By `weight`: its share of as many as all sets hold together.
    """
    total_weight = sum(part.weight for part in sets)
    if total_weight:
        return tuple(max(round(sum(sizes) * part.weight / total_weight), 1) for part in sets)
    return tuple(max(round(size * part.epochs), 1) for part, size in zip(sets, sizes, strict=True))


def _order(reader: ShardReader, data: DataConfig, seed: int, first: int, num_shards: int) -> Order:
    return Order(
        num_questions=tuple(reader.num_questions[first : first + num_shards]),
        seed=seed,
        shuffle=data.shuffle,
        window_shards=data.shuffle_window,
        num_runs=data.order_runs,
        questions_per_clip=data.questions_per_clip,
        first_shard=first,
        sample_questions=reader.sample_questions,
    )


def _own_epochs(order: Order, start: int, end: int) -> list[Piece]:
    """The examples `start` to `end` (exclusive) of a set, counted over all its epochs."""
    size, found = order.num_examples, []
    while start < end:
        epoch, first = divmod(start, size)
        last = min(first + end - start, size)
        found.append(Piece(order, epoch, first, last))
        start += last - first
    return found
