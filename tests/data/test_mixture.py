"""A mixture is exact, the same in every world, seekable, and every step has its share of each set."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.config.schema import DataConfig, MixtureSet
from mellow_ds.data.mixture import Mixture, epoch_counts, epochs_from_config
from mellow_ds.data.order import Order, examples_of_rank, examples_of_step, steps_per_epoch
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import ShardError
from tests.data.made_shards import RATE, simple_clips, write_shards

SETS = (
    Order((10, 7), seed=1, num_runs=3),
    Order((50,), seed=2, num_runs=3, first_shard=2),
    Order((3,), 3, first_shard=3),
)


def whole_epoch(mixture: Mixture, epoch: int, size: int = 8) -> np.ndarray:
    steps = [examples_of_step(mixture, size, epoch, s) for s in range(steps_per_epoch(mixture.num_examples, size))]
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    return np.concatenate(steps)


@pytest.mark.parametrize("counts", [(17, 50, 3), (34, 25, 12), (1, 100, 7), (5, 5, 5)])
def test_each_set_goes_through_its_epochs_example_by_example(counts: tuple[int, ...]) -> None:
    """Over some epochs of the mixture, each example of a set has come up as often as any other, to within one."""
    mixture = Mixture(SETS, counts)
    seen: Counter[tuple[int, int]] = Counter()
    own_epochs = Counter()
    for epoch in range(5):
        for shard, number, own_epoch in whole_epoch(mixture, epoch).tolist():
            seen[shard, number] += 1
            own_epochs[shard, number, own_epoch] += 1
    assert set(own_epochs.values()) == {1}  # once in each of its set's epochs
    for order, count in zip(SETS, counts, strict=True):
        shards = range(order.first_shard, order.first_shard + len(order.num_questions))
        times = [seen[shard, n] for shard, size in zip(shards, order.num_questions, strict=True) for n in range(size)]
        assert sum(times) == 5 * count
        assert max(times) - min(times) <= 1


def test_every_step_has_its_share_of_each_set() -> None:
    mixture = Mixture(SETS, (20, 60, 10))
    for step in range(9):
        shards = examples_of_step(mixture, 10, 0, step)[:, 0]
        found = [int(((shards >= low) & (shards < high)).sum()) for low, high in ((0, 2), (2, 3), (3, 4))]
        assert np.abs(np.array(found) - np.array([20, 60, 10]) / 9).max() <= 2


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_ranks_share_the_same_global_batch(world: int) -> None:
    mixture = Mixture(SETS, (34, 25, 12))
    for epoch, step in ((0, 0), (3, 4), (2, 8)):
        whole = examples_of_step(mixture, 8, epoch, step)
        ranks = [examples_of_rank(mixture, 8, epoch, step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(ranks), whole)


def test_a_mixture_of_one_set_taken_once_is_that_set() -> None:
    for epoch in range(3):
        alone, mixed = (whole_epoch(order, epoch) for order in (SETS[0], Mixture(SETS[:1], (17,))))
        np.testing.assert_array_equal(mixed, alone)


def test_counts_follow_weights_or_epochs() -> None:
    weights = [MixtureSet(("a",), weight=3), MixtureSet(("b",), weight=1)]
    assert epoch_counts(weights, [100, 300]) == (300, 100)
    epochs = [MixtureSet(("a",), epochs=2), MixtureSet(("b",), epochs=0.5)]
    assert epoch_counts(epochs, [100, 301]) == (200, 150)


def test_sets_are_found_among_the_folders(tmp_path: Path) -> None:
    folders = [
        str(write_shards(tmp_path / name, [simple_clips(n, 3), simple_clips(n + 9, 2)])) for n, name in enumerate("abc")
    ]
    data = DataConfig(mixture=(MixtureSet((folders[0], folders[1]), epochs=1), MixtureSet((folders[2],), epochs=2)))
    mixture = epochs_from_config(ShardReader(data.train_shards, RATE), data, seed=5)
    assert isinstance(mixture, Mixture)
    assert [(order.first_shard, order.num_questions) for order in mixture.orders] == [(0, (6, 4, 6, 4)), (4, (6, 4))]
    assert mixture.counts == (20, 20)
    assert mixture.orders[0].seed != mixture.orders[1].seed
    plain = epochs_from_config(
        ShardReader(folders[:1], RATE), DataConfig(shards=(folders[0],), shuffle_window=7, order_runs=9), 3
    )
    assert plain == Order((6, 4), 3, True, 7, 9)


def test_a_set_without_questions_is_refused(tmp_path: Path) -> None:
    full = str(write_shards(tmp_path / "full", [simple_clips(0, 3)]))
    empty = str(write_shards(tmp_path / "empty", [simple_clips(1, 2, questions_each=0)]))
    data = DataConfig(mixture=(MixtureSet((full,), weight=1), MixtureSet((empty,), weight=1, name="none")))
    with pytest.raises(ShardError, match="the set none in data"):
        epochs_from_config(ShardReader(data.train_shards, RATE), data, seed=5)
