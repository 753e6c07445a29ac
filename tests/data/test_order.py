"""The order is exact, the same for every world, seekable, and well mixed: properties over a grid."""

import itertools
import pickle
import time
from collections import Counter

import numpy as np
import pytest

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.order import (
    BatchPlan,
    Order,
    examples_of_rank,
    examples_of_step,
    micro_batches,
    permute,
    rank_slice,
    steps_per_epoch,
)
from mellow_ds.errors import ConfigError
from mellow_ds.world import World

SIZES = {
    "one example": (1,),
    "one shard": (53,),
    "uneven": (10, 10, 10, 7),
    "empty shards": (0, 5, 0, 0, 9, 0),
    "many": tuple(int(n) for n in np.random.default_rng(0).integers(0, 40, 37)),
}

PINNED = (
    [(2, 2), (1, 3), (2, 6), (1, 1), (2, 5), (2, 7), (0, 5), (3, 2)],
    [(2, 6), (0, 2), (2, 8), (2, 5), (1, 0), (1, 1), (3, 3), (1, 3)],
)


def key(number: int) -> np.ndarray:
    return np.full(1, number, dtype=np.uint64)


def all_of(order: Order) -> set[tuple[int, int]]:
    return {(shard, number) for shard, count in enumerate(order.num_questions) for number in range(count)}


def as_tuples(examples: np.ndarray) -> list[tuple[int, int]]:
    return [(int(shard), int(number)) for shard, number, _ in examples]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("runs", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 4, 1000])
def test_every_example_is_seen_once_an_epoch(name: str, shuffle: bool, runs: int, window: int) -> None:
    order = Order(SIZES[name], seed=3, shuffle=shuffle, window_shards=window, num_runs=runs)
    for size, epoch in itertools.product((7, 64, 1000), (0, 1)):
        steps = [
            examples_of_step(order, size, epoch, step) for step in range(steps_per_epoch(order.num_examples, size))
        ]
        assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
        seen = as_tuples(np.concatenate(steps))
        assert len(seen) == order.num_examples
        assert set(seen) == all_of(order)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
def test_ranks_share_the_same_global_batch_in_every_world(name: str, accumulation: int) -> None:
    order = Order(SIZES[name], seed=1, num_runs=8)
    global_size = 64
    for step in {0, 1, steps_per_epoch(order.num_examples, global_size) - 1}:
        if step >= steps_per_epoch(order.num_examples, global_size):
            continue
        whole = examples_of_step(order, global_size, 2, step)
        for world in (1, 2, 3, 5, 8, 13, 31, 64):
            ranks = [examples_of_rank(order, global_size, 2, step, rank, world) for rank in range(world)]
            np.testing.assert_array_equal(np.concatenate(ranks), whole)
            assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
            batch_size = max(1, global_size // (world * accumulation))
            plan = BatchPlan.from_config(
                TrainConfig(batch_size=batch_size, global_batch_size=global_size), World(0, world)
            )
            for rank in ranks:
                parts = micro_batches(rank, plan.micro_batches)
                assert len(parts) == plan.micro_batches
                assert max(map(len, parts)) <= batch_size
                assert max(map(len, parts)) - min(map(len, parts)) <= 1
                np.testing.assert_array_equal(np.concatenate(parts), rank)


def test_sizes_that_divide_nothing_have_the_expected_slices() -> None:
    assert [rank_slice(10, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
    assert [rank_slice(2, rank, 3) for rank in range(3)] == [slice(0, 0), slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    ("train", "world", "expected"),
    [
        ({"batch_size": 4}, 1, BatchPlan(4, 1)),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 8, BatchPlan(96, 3)),
        ({"batch_size": 4, "global_batch_size": 64}, 8, BatchPlan(64, 2)),
        (
            {"batch_size": 4, "global_batch_size": 64},
            7,
            BatchPlan(64, 3),
        ),  # ranks have 9 or 10: micro-batches of 3 or 4
        ({"batch_size": 4, "global_batch_size": 5}, 5, BatchPlan(5, 1)),
        ({"batch_size": 4, "global_batch_size": 3}, 1, BatchPlan(3, 1)),
    ],
)
def test_accumulation_follows_from_the_world(train: dict[str, int], world: int, expected: BatchPlan) -> None:
    assert BatchPlan.from_config(TrainConfig(**train), World(0, world)) == expected


def test_a_global_batch_below_the_world_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size is 3, but 4 processes"):
        BatchPlan.from_config(TrainConfig(global_batch_size=3), World(0, 4))


def test_position_is_a_round_robin_over_equal_runs() -> None:
    """A hand-made case: one window of 11 examples cut into 3 runs of 3, two left over."""
    order = Order((11,), seed=9, num_runs=3)
    sequence = examples_of_step(Order((11,), seed=9, num_runs=1), 11, 0, 0)
    first = examples_of_step(order, 4, 0, 0)  # positions 0 1 2 3 = run 0, 1, 2, 0
    np.testing.assert_array_equal(first, sequence[[0, 1, 3, 6]])
    last = examples_of_step(order, 4, 0, 2)  # positions 8 9 10 = run 2, then what is left over
    np.testing.assert_array_equal(last, sequence[[8, 9, 10]])


def test_a_rank_touches_its_share_of_the_runs() -> None:
    """64 shards, windows of 1: 64 runs are one shard each, so a rank of 16 reads 4 shards the whole epoch long."""
    order = Order((320,) * 64, window_shards=1, num_runs=64)
    for rank in (0, 7, 15):
        shards = {int(shard) for step in range(80) for shard in examples_of_rank(order, 256, 0, step, rank, 16)[:, 0]}
        assert len(shards) == 4


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order((100, 80, 60), seed=5)
    first, again = (examples_of_step(Order((100, 80, 60), seed=5), 240, 0, 0) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (examples_of_step(order, 240, 1, 0) != first).any()
    assert (examples_of_step(Order((100, 80, 60), seed=6), 240, 0, 0) != first).any()
    copied = pickle.loads(pickle.dumps(order))  # noqa: S301 (our own object, as loaders get it)
    np.testing.assert_array_equal(examples_of_step(copied, 240, 0, 0), first)


def test_the_order_is_the_same_in_every_version() -> None:
    """A checkpoint made today goes on tomorrow: the first examples of two epochs, written down once."""
    order = Order((7, 5, 9, 4), seed=1234, window_shards=2, num_runs=4)
    assert as_tuples(examples_of_step(order, 8, 0, 0)) == PINNED[0]
    assert as_tuples(examples_of_step(order, 8, 1, 2)) == PINNED[1]


def test_without_shuffle_the_order_is_that_of_storage() -> None:
    order = Order((3, 0, 2), shuffle=False)
    expected = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert as_tuples(examples_of_step(order, 5, 0, 0)) == expected
    assert as_tuples(examples_of_step(order, 2, 7, 1)) == expected[2:4]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    for number in range(5):
        assert sorted(permute(np.arange(size), size, key(number))) == list(range(size))


def test_permute_takes_sizes_and_keys_by_element() -> None:
    sizes = np.array([5] * 5 + [300] * 300)
    keys = np.where(sizes == 5, 11, 22).astype(np.uint64)
    indices = np.concatenate([np.arange(5), np.arange(300)])
    mixed = permute(indices, sizes, keys)
    np.testing.assert_array_equal(mixed[:5], permute(np.arange(5), 5, key(11)))
    np.testing.assert_array_equal(mixed[5:], permute(np.arange(300), 300, key(22)))


def test_all_permutations_of_five_things_are_equally_likely() -> None:
    """Chi-squared over the 120 permutations, 119 degrees of freedom: above 181 once in 5,000 for uniform ones."""
    draws = 12_000
    keys = np.repeat(np.random.default_rng(1).integers(0, 2**63, draws, dtype=np.uint64), 5)
    found = permute(np.tile(np.arange(5), draws), 5, keys).reshape(draws, 5)
    counts = np.array(list(Counter(map(bytes, found.astype(np.uint8))).values()))
    assert len(counts) == 120
    expected = draws / 120
    assert ((counts - expected) ** 2 / expected).sum() < 181


def test_neighbours_of_a_large_permutation_are_unrelated() -> None:
    """The mean distance of neighbours is n / 3, and the rank correlation with the place is none (sigma 0.01)."""
    size = 10_000
    found = permute(np.arange(size), size, key(77))
    assert abs(np.abs(np.diff(found)).mean() / size - 1 / 3) < 0.01
    assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < 0.04


def test_shards_of_an_epoch_are_permuted() -> None:
    """Each of 4 shards leads the sequence in about a quarter of the epochs."""
    order = Order((1, 1, 1, 1), window_shards=1, num_runs=1)
    leaders = Counter(int(examples_of_step(order, 1, epoch, 0)[0, 0]) for epoch in range(400))
    assert all(70 < leaders[shard] < 130 for shard in range(4))


def test_seeking_costs_the_same_everywhere() -> None:
    """10,000 shards of 13,000 questions: step 1,000,000 as fast as step 0, in milliseconds."""
    order = Order((13_000,) * 10_000)
    examples_of_step(order, 128, 0, 0)
    took = []
    for step in range(1_000_000, 1_000_005):
        started = time.process_time()
        assert len(examples_of_step(order, 128, 0, step)) == 128
        took.append(time.process_time() - started)
    assert min(took) < 0.1


def clips_of(seed: int, shard: int) -> np.ndarray:
    """Made-up numbers of questions by sample."""
    return np.random.default_rng((seed, shard)).integers(0, 9, 30)


def blocked(k: int, num_shards: int = 7, **settings: int) -> Order:
    counts = [clips_of(1, shard) for shard in range(num_shards)]
    sizes = tuple(int(c.sum()) for c in counts)
    return Order(sizes, seed=4, questions_per_clip=k, sample_questions=lambda shard: clips_of(1, shard), **settings)


def clip_of(shard: int, number: int) -> tuple[int, int]:
    return shard, int(np.searchsorted(np.cumsum(clips_of(1, shard)), number, side="right"))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("runs", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 3])
def test_blocks_of_a_clip_are_seen_once_an_epoch_in_every_world(k: int, runs: int, window: int) -> None:
    order = blocked(k, num_runs=runs, window_shards=window)
    for epoch in (0, 1):
        steps = [examples_of_step(order, 37, epoch, s) for s in range(steps_per_epoch(order.num_examples, 37))]
        assert [len(step) for step in steps[:-1]] == [37] * (len(steps) - 1)
        assert sorted(as_tuples(np.concatenate(steps))) == sorted(all_of(order))
        for world in (2, 5, 64):
            ranks = [examples_of_rank(order, 37, epoch, 2, rank, world) for rank in range(world)]
            np.testing.assert_array_equal(np.concatenate(ranks), steps[2])


@pytest.mark.parametrize("k", [2, 4])
def test_questions_of_a_clip_stand_together_in_a_batch(k: int) -> None:
    """The number of different clips of a batch against the bound that the blocks give, and against no blocks."""
    order, plain = blocked(k, num_runs=4, window_shards=2), blocked(1, num_runs=4, window_shards=2)
    per_clip = np.concatenate([clips_of(1, shard) for shard in range(7)])
    num_whole, num_over = int((per_clip // k).sum()), int((per_clip % k).sum())
    size, steps = 8 * k, order.num_examples // (8 * k)
    pairs = {
        name: sum(len({clip_of(*e) for e in as_tuples(examples_of_step(o, size, 0, s))}) for s in range(steps))
        for name, o in (("blocks", order), ("plain", plain))
    }
    assert pairs["blocks"] <= num_whole + num_over
    assert pairs["blocks"] < 0.8 * pairs["plain"]


def test_blocks_hold_other_questions_each_epoch() -> None:
    order = blocked(2, num_runs=1, window_shards=7)

    def pairs_of(epoch: int) -> set[tuple[tuple[int, int], ...]]:
        whole = as_tuples(examples_of_step(order, order.num_examples, epoch, 0))
        return {tuple(sorted(whole[i : i + 2])) for i in range(0, len(whole), 2)}

    assert len(pairs_of(0) & pairs_of(1)) < 0.4 * len(pairs_of(0))
    copied = pickle.loads(pickle.dumps(blocked_by_method()))  # noqa: S301 (our own object, as loaders get it)
    whole = examples_of_step(blocked_by_method(), 50, 0, 1)
    np.testing.assert_array_equal(examples_of_step(copied, 50, 0, 1), whole)


def blocked_by_method() -> Order:
    return Order((60, 60), seed=1, questions_per_clip=3, sample_questions=twelve_clips_of_five)


def twelve_clips_of_five(shard: int) -> np.ndarray:
    assert shard in (0, 1)
    return np.full(12, 5)


def test_seeking_in_blocks_reads_a_few_windows() -> None:
    """10,000 shards: step 1,000,000 asks for the clips of the windows of its 8 runs and of no others."""
    asked = []

    def twelve_of_five(shard: int) -> np.ndarray:
        asked.append(shard)
        return np.full(2600, 5)

    order = Order((13_000,) * 10_000, num_runs=8, questions_per_clip=4, sample_questions=twelve_of_five)
    assert len(examples_of_step(order, 128, 0, 1_000_000)) == 128
    assert len(asked) == 8 * 4
