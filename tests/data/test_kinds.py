"""Kinds of examples: numbered by set and subtype, and added up by name."""

from pathlib import Path

import pytest

from mellow_ds.config.schema import DataConfig, MixtureSet
from mellow_ds.data.kinds import Kinds, kinds_from_config
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import ShardError
from tests.data.made_shards import RATE, simple_clips, write_shards


def test_every_pair_has_a_number_of_its_own() -> None:
    kinds = Kinds(("a", "b"), (0, 3), ("x", "y", "z"))
    numbers = [kinds.number(shard, subtype) for shard in (0, 3) for subtype in "xyz"]
    assert numbers == list(range(kinds.num_kinds))
    assert kinds.number(2, "y") == kinds.number(0, "y")
    assert kinds.number(9, "y") == kinds.number(3, "y")
    with pytest.raises(ShardError, match="subtype 'w', which no manifest names"):
        kinds.number(0, "w")


def test_sums_by_subtype_and_by_set() -> None:
    kinds = Kinds(("a", "b"), (0, 3), ("x", ""))
    assert kinds.sums([(1.0, 2), (3.0, 4), (10.0, 20), (30.0, 40)]) == {
        "subtype/x": (11.0, 22),
        "subtype/none": (33.0, 44),
        "set/a": (4.0, 6),
        "set/b": (40.0, 60),
    }
    assert Kinds(("",), (0,), ("x",)).sums([(1.0, 2)]) == {"subtype/x": (1.0, 2)}


def test_sets_and_subtypes_come_from_mixture_and_manifests(tmp_path: Path) -> None:
    folders = [
        str(write_shards(tmp_path / name, [simple_clips(n, 3), simple_clips(n + 9, 2)])) for n, name in enumerate("abc")
    ]
    mixture = (MixtureSet(tuple(folders[:2]), "both", epochs=1), MixtureSet((folders[2],), epochs=2))
    data = DataConfig(mixture=mixture)
    reader = ShardReader(data.train_shards, RATE)
    assert kinds_from_config(reader, data) == Kinds(("both", "c"), (0, 4), ("kind-1", "kind-2"))
    assert kinds_from_config(reader, DataConfig()) == Kinds(("",), (0,), ("kind-1", "kind-2"))
