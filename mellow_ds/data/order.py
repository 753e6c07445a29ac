"""Which example goes where: pure functions of (shard sizes, seed, epoch, step, world). Numpy only, no torch, no state.

The way from a step to its examples:

1. An epoch's *sequence* is every example once: shards permuted by (seed, epoch), taken in windows of `window_shards`,
   examples permuted inside a window. With `questions_per_clip` k > 1 what is permuted are blocks of k examples: k
   questions of one clip, drawn anew each epoch, and blocks of what clips have over. The fewer than k examples that a
   window has over stand at the end of the sequence, so that all blocks start at multiples of k.
2. The sequence is cut by count into `num_runs` equal runs of whole blocks; what is left over stands at the end. The
   *positions* of the epoch take a block of each run in turn, and the left-over examples come last. So neighbours in a
   batch were stored far apart, and each run is read front to back.
3. Step s of the epoch takes positions s * G to (s + 1) * G, the last step what is left, sorted by their place in the
   sequence. A rank takes a contiguous slice of that, and so touches about num_runs / world runs.

Without shuffle, sequence and positions are the order of storage. Permutations are keyed functions, not tables: nothing
grows with the corpus but a few numbers a shard, and any step costs the same. Only blocks need a table, of one window.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.errors import ConfigError
from mellow_ds.world import World

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment (Steele, Lea, Flood 2014)
_FEISTEL_ROUNDS = 8  # 4 make a random permutation of a random function (Luby, Rackoff 1988); small sizes need more
_MIN_SIDE = 4  # with a smaller square or fewer rounds, some permutations of 5 things come up more often than others
_SHARDS, _EXAMPLES, _QUESTIONS, _LEFTOVERS, _BLOCKS = 1, 2, 3, 4, 5  # what a key permutes


class Epochs(Protocol):
    """What steps are cut from: epochs of a fixed number of examples. An `Order` is one, a `Mixture` another."""

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        ...

    def pieces(self, epoch: int, first: int, last: int) -> "list[Piece]":
        """Whose examples stand at the positions `first` to `last` (exclusive) of an epoch."""
        ...


@dataclass(frozen=True)
class Piece:
    """Positions `first` to `last` (exclusive) of an epoch of one order."""

    order: "Order"
    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class Order:
    """The order of all epochs over shards with these numbers of questions."""

    num_questions: tuple[int, ...]  # by shard
    seed: int = 0
    shuffle: bool = True  # False: the order of storage, every epoch the same
    window_shards: int = 4  # shards whose examples are permuted together
    num_runs: int = 64  # equal runs of the sequence; a global batch takes its share of each
    questions_per_clip: int = 1  # questions of a clip that stand next to each other
    first_shard: int = 0  # number of the first of these shards among all of the run
    sample_questions: Callable[[int], np.ndarray] | None = field(default=None, compare=False)
    """Number of questions [samples] of each sample of a shard of the run; needed for questions_per_clip > 1."""

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return int(self._question_starts[-1])

    def pieces(self, epoch: int, first: int, last: int) -> list[Piece]:
        """One piece: all positions are its own."""
        return [Piece(self, epoch, first, last)]

    @property
    def block_size(self) -> int:
        """Examples that stay together."""
        return self.questions_per_clip if self.shuffle else 1

    @cached_property
    def _question_starts(self) -> np.ndarray:
        """[shards + 1]: number of the first question of each shard in the order of storage."""
        return _starts(np.asarray(self.num_questions, dtype=np.int64))

    @cached_property
    def _epochs(self) -> "dict[int, _EpochTable]":
        return {}

    def _epoch(self, epoch: int) -> "_EpochTable":
        """The permuted shards of an epoch; O(shards) on first use, the newest two are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _EpochTable.build(self, epoch)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, object]:
        # tables are quickly made anew, and a window of blocks would be megabytes to send
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


@dataclass(frozen=True)
class _EpochTable:
    """Where the shards and windows of one epoch stand in its sequence."""

    shards: np.ndarray  # [shards] number of the shard at each place
    shard_starts: np.ndarray  # [shards + 1] first example of each place, counted over the windows in full
    window_starts: np.ndarray  # [windows + 1] first example of each window, counted so
    block_starts: np.ndarray  # [windows + 1] sequence index of the first of the window's whole blocks
    window_keys: np.ndarray  # [windows] what permutes the examples of each window
    rest_starts: np.ndarray  # [windows + 1] sequence index of the first of the examples that it has over
    blocks: dict[int, np.ndarray]  # by window: the newest tables of blocks

    @classmethod
    def build(cls, order: Order, epoch: int) -> "_EpochTable":
        num_shards = len(order.num_questions)
        shards = np.argsort(_key(order.seed, epoch, _SHARDS, np.arange(num_shards)), kind="stable")
        shard_starts = _starts(np.asarray(order.num_questions, dtype=np.int64)[shards])
        window_starts = np.append(shard_starts[:-1][:: order.window_shards], shard_starts[-1])
        sizes = np.diff(window_starts)
        over = sizes % order.block_size
        block_starts = _starts(sizes - over)
        keys = _key(order.seed, epoch, _EXAMPLES, np.arange(len(sizes)))
        rest_starts = block_starts[-1] + _starts(over)
        return cls(shards, shard_starts, window_starts, block_starts, keys, rest_starts, {})


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step is cut: the same on every rank and for every step of the run."""

    global_batch_size: int  # examples of an optimizer step on all ranks
    micro_batches: int  # of a rank and step; some may be empty in the last step of an epoch

    @classmethod
    def from_config(cls, train: TrainConfig, world: World) -> "BatchPlan":
        """The plan that train.batch_size, global_batch_size and gradient_accumulation_steps ask for.

        Raises `ConfigError` where the global batch is smaller than the world.
        """
        size = train.global_batch_size or train.batch_size * world.size * train.gradient_accumulation_steps
        if size < world.size:
            raise ConfigError(
                f"train.global_batch_size is {size}, but {world.size} processes train (world size, set by "
                f"{world.launcher}): give at least {world.size}, or start fewer processes"
            )
        return cls(size, _ceil_div(_ceil_div(size, world.size), train.batch_size))


def steps_per_epoch(num_examples: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch, the last, smaller one included."""
    return _ceil_div(num_examples, global_batch_size)


def examples_of_step(epochs: Epochs, global_batch_size: int, epoch: int, step_in_epoch: int) -> np.ndarray:
    """[n, 3] int64 (shard, question number in it, epoch of its shard set) of the global batch.

    n is smaller in the epoch's last step.
    """
    return examples_of_rank(epochs, global_batch_size, epoch, step_in_epoch, rank=0, world_size=1)


def examples_of_rank(
    epochs: Epochs, global_batch_size: int, epoch: int, step_in_epoch: int, rank: int, world_size: int
) -> np.ndarray:
    """[n, 3] int64 as `examples_of_step`: the contiguous part of the global batch that `rank` takes."""
    first = step_in_epoch * global_batch_size
    last = min(first + global_batch_size, epochs.num_examples)
    own = rank_slice(last - first, rank, world_size)
    found, start = np.empty((own.stop - own.start, 3), dtype=np.int64), 0
    for piece in epochs.pieces(epoch, first, last):
        places = np.sort(_sequence_index(piece.order, np.arange(piece.first, piece.last)))
        first_own = max(own.start - start, 0)
        places = places[first_own : max(own.stop - start, 0)]
        if len(places):
            rows = found[start + first_own - own.start :][: len(places)]
            rows[:, 0], rows[:, 1] = _examples_at(piece.order, piece.epoch, places)
            rows[:, 2] = piece.epoch
        start += piece.last - piece.first
    return found


def rank_slice(num_examples: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that a rank takes; parts differ by at most one example."""
    return slice(num_examples * rank // world_size, num_examples * (rank + 1) // world_size)


def micro_batches(examples: np.ndarray, num_micro_batches: int) -> list[np.ndarray]:
    """A rank's examples in `num_micro_batches` contiguous parts; sizes differ by at most one, some may be empty."""
    return [examples[rank_slice(len(examples), part, num_micro_batches)] for part in range(num_micro_batches)]


def permute(indices: np.ndarray, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0 .. size - 1 puts each of `indices`, int64 [n]; `size` and `key` may be arrays [n].

    A Feistel network over the cells of a square a little larger than `size`, walked along its cycle until it is below
    `size` (Black, Rogaway 2002): no table, hardly any walking from a size of 16 on, the same in every numpy.
    """
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), indices.shape)
    key = np.broadcast_to(key, indices.shape)
    height = np.maximum(np.sqrt(size).astype(np.uint64), np.uint64(_MIN_SIDE))
    width = np.maximum((size + height - np.uint64(1)) // height, np.uint64(_MIN_SIDE))
    result = _feistel(indices.astype(np.uint64), height, width, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], height[outside], width[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    return result.astype(np.int64)


def _feistel(value: np.ndarray, height: np.ndarray, width: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of the cells 0 .. height * width - 1: row and column are shifted by turns by a hash."""
    row, column = value // width, value % width
    for _ in range(_FEISTEL_ROUNDS // 2):
        key = key + _GOLDEN
        row = (row + _mix(column ^ key) % height) % height
        key = key + _GOLDEN
        column = (column + _mix(row ^ key) % width) % width
    return row * width + column


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of the uint64 input moves about half of the bits of the output."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _key(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 key [1] or [n] that is a function of `parts`, which are whole numbers or arrays of them."""
    key = np.zeros(1, dtype=np.uint64)  # arrays throughout: numpy's scalars warn of the overflow that is wanted here
    for part in parts:
        number = np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64)
        key = _mix((key ^ number) + _GOLDEN)
    return key


def _sequence_index(order: Order, positions: np.ndarray) -> np.ndarray:
    """[n] place in the epoch's sequence of each position of the epoch."""
    if not order.shuffle:
        return positions
    size = order.block_size
    run_length = order.num_examples // (order.num_runs * size) * size
    block, in_block = positions // size, positions % size
    in_run = (block % order.num_runs) * run_length + block // order.num_runs * size + in_block
    return np.where(positions < run_length * order.num_runs, in_run, positions)


def _examples_at(order: Order, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] shard of the run and [n] question number in it, at places of the epoch's sequence."""
    if not order.shuffle:
        shard = np.searchsorted(order._question_starts, places, side="right") - 1
        return order.first_shard + shard, places - order._question_starts[shard]
    table = order._epoch(epoch)
    if order.block_size > 1:
        places = _in_blocks(order, epoch, table, places)
    else:
        window = np.searchsorted(table.window_starts, places, side="right") - 1
        first = table.window_starts[window]
        size = table.window_starts[window + 1] - first
        places = first + permute(places - first, size, table.window_keys[window])
    place = np.searchsorted(table.shard_starts, places, side="right") - 1
    return order.first_shard + table.shards[place], places - table.shard_starts[place]


def _in_blocks(order: Order, epoch: int, table: _EpochTable, places: np.ndarray) -> np.ndarray:
    """[n] which example, counted over the windows in full, stands at each place of a sequence of blocks."""
    in_block = np.searchsorted(table.block_starts, places, side="right") - 1
    in_rest = np.searchsorted(table.rest_starts, places, side="right") - 1
    is_rest = places >= table.block_starts[-1]
    window = np.where(is_rest, in_rest, in_block)
    first = np.where(
        is_rest, table.rest_starts[window] - np.diff(table.block_starts)[window], table.block_starts[window]
    )
    found = np.empty_like(places)
    for number in np.unique(window).tolist():
        here = window == number
        found[here] = table.window_starts[number] + _window_blocks(order, epoch, table, number)[(places - first)[here]]
    return found


def _window_blocks(order: Order, epoch: int, table: _EpochTable, window: int) -> np.ndarray:
    """[n] the examples of a window, as numbers in it: first its whole blocks, permuted, then what is over."""
    if window not in table.blocks:
        while len(table.blocks) >= 2 * order.num_runs:
            del table.blocks[next(iter(table.blocks))]
        first = window * order.window_shards
        table.blocks[window] = _make_blocks(order, epoch, window, table.shards[first : first + order.window_shards])
    return table.blocks[window]


def _make_blocks(order: Order, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
    assert order.sample_questions is not None, "questions_per_clip needs the numbers of questions by sample"

    def drawn(what: int, numbers: np.ndarray) -> np.ndarray:
        return _key(order.seed, epoch, what, window, numbers)

    size = order.questions_per_clip
    counts = np.concatenate([order.sample_questions(order.first_shard + shard) for shard in shards.tolist()])
    counts = counts.astype(np.int64)
    clip = np.repeat(np.arange(len(counts)), counts)  # [n] of each example
    number = np.arange(len(clip))
    mixed = np.lexsort((drawn(_QUESTIONS, number), clip))  # clip by clip, its questions in an order of this epoch
    rank = number - np.repeat(_starts(counts)[:-1], counts)  # of each in its clip
    is_over = rank >= np.repeat(counts // size * size, counts)
    over = mixed[is_over]
    line = np.concatenate([mixed[~is_over], over[np.argsort(drawn(_LEFTOVERS, over), kind="stable")]])
    num_blocks = len(line) // size
    blocks = line[: num_blocks * size].reshape(num_blocks, size)
    blocks = blocks[np.argsort(drawn(_BLOCKS, np.arange(num_blocks)), kind="stable")]
    return np.concatenate([blocks.reshape(-1), line[num_blocks * size :]]).astype(np.int32)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
