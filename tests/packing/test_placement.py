"""Placement: every clip once, every question's clips together, few copies."""

import hashlib
import random
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from mellow_ds.packing.placement import Pairs, place_clips


@dataclass
class Placement:
    """A placement by keys."""

    shards: tuple[tuple[str, ...], ...]
    home: dict[str, int]
    replication: float


def place(sizes: dict[str, int], partners: dict[str, list[str]], shard_bytes: int) -> Placement:
    """`place_clips` of clips by their keys."""
    names = sorted(sizes)
    numbers = {name: number for number, name in enumerate(names)}
    pairs = Pairs(len(names))
    for name in sorted(partners):
        pairs.add(numbers[name], sorted(numbers[other] for other in set(partners[name])))
    pairs.finish()
    found = place_clips(np.array([sizes[name] for name in names], np.int64), pairs, shard_bytes)
    shards = tuple(tuple(names[number] for number in shard) for shard in found.shards)
    home = {name: int(number) for name, number in zip(names, found.home, strict=True) if number >= 0}
    return Placement(shards, home, found.replication)


def keys(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(count)]


def check(placement: Placement, sizes: dict[str, int], partners: dict[str, list[str]], shard_bytes: int) -> None:
    """What must hold for any graph."""
    assert set(placement.home) == set(sizes)
    stored = [set(shard) for shard in placement.shards]
    for key, shard in placement.home.items():
        assert key in stored[shard]
        assert set(partners.get(key, ())) <= stored[shard]
    needed: list[set[str]] = [set() for _ in stored]
    for key, shard in placement.home.items():
        needed[shard] |= {key, *partners.get(key, ())}
    assert needed == stored, "a shard holds a clip that no question of it needs"
    assert all(list(shard) == sorted(set(shard)) for shard in placement.shards)
    largest = max((sizes[key] + sum(sizes[other] for other in set(partners.get(key, ()))) for key in sizes), default=0)
    assert all(sum(sizes[key] for key in shard) <= max(shard_bytes, largest) for shard in placement.shards)


def breadth_first_replication(sizes: dict[str, int], partners: dict[str, list[str]], shard_bytes: int) -> float:
    """The plain way, as a reference: walk breadth first, cut where the shard is full."""
    links: dict[str, set[str]] = {key: set() for key in sizes}
    for key, others in partners.items():
        for other in others:
            links[key].add(other)
            links[other].add(key)
    seen: set[str] = set()
    order: list[str] = []
    for start in sorted(sizes):
        queue = [] if start in seen else [start]
        seen.add(start)
        for key in queue:
            order.append(key)
            fresh = sorted(links[key] - seen)
            seen.update(fresh)
            queue += fresh
    num_stored, shard = 0, set[str]()
    for key in order:
        grown = shard | {key, *partners.get(key, ())}
        if shard and sum(sizes[other] for other in grown) > shard_bytes:
            num_stored += len(shard)
            grown = {key, *partners.get(key, ())}
        shard = grown
    return (num_stored + len(shard)) / len(sizes)


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_is_placed_whole(seed: int) -> None:
    draw = random.Random(seed)
    clips = keys(draw.randint(1, 120))
    sizes = {key: draw.randint(1, 50) for key in clips}
    asking = draw.sample(clips, draw.randint(0, len(clips)))
    partners = {key: [draw.choice(clips) for _ in range(draw.randint(0, 4))] for key in asking}
    shard_bytes = draw.choice((1, 60, 300, 100_000))
    check(place(sizes, partners, shard_bytes), sizes, partners, shard_bytes)


def test_clips_without_partners_are_stored_once_and_shards_are_full() -> None:
    sizes = dict.fromkeys(keys(100), 10)
    placement = place(sizes, {}, 95)
    assert placement.replication == 1
    assert [len(shard) for shard in placement.shards] == [9] * 11 + [1]


def test_pairs_fall_together() -> None:
    clips = keys(200)
    sizes = dict.fromkeys(clips, 10)
    partners = {clips[number]: [clips[number + 1]] for number in range(0, 200, 2)}
    placement = place(sizes, partners, 90)
    check(placement, sizes, partners, 90)
    assert placement.replication == 1
    assert all(len(shard) == 8 for shard in placement.shards)


def test_a_chain_costs_one_copy_a_cut() -> None:
    clips = keys(300)
    sizes = dict.fromkeys(clips, 1)
    partners = {clips[number]: [clips[number + 1]] for number in range(299)}
    placement = place(sizes, partners, 50)
    check(placement, sizes, partners, 50)
    assert sum(map(len, placement.shards)) - 300 <= 2 * (len(placement.shards) - 1)


@pytest.mark.parametrize(("degree", "at_most"), [(1, 1.08), (2, 2.2)])
def test_a_random_pair_graph_needs_fewer_copies_than_a_breadth_first_cut(degree: int, at_most: float) -> None:
    draw = random.Random(0)
    clips = keys(3_000)
    sizes = dict.fromkeys(clips, 1)
    partners = {key: draw.sample(clips, degree) for key in clips}
    placement = place(sizes, partners, 200)
    check(placement, sizes, partners, 200)
    reference = breadth_first_replication(sizes, partners, 200)
    assert placement.replication < reference
    assert placement.replication < at_most


def test_the_order_of_the_arguments_does_not_matter() -> None:
    draw = random.Random(0)
    clips = keys(200)
    sizes = {key: draw.randint(1, 9) for key in clips}
    partners = {key: draw.sample(clips, 3) for key in clips}
    turned = {key: partners[key][::-1] for key in reversed(clips)}
    assert place(sizes, partners, 100) == place(dict(reversed(sizes.items())), turned, 100)


def test_nothing_gives_nothing() -> None:
    assert place({}, {}, 100) == Placement((), {}, 0)


def test_clips_of_no_size_are_not_placed() -> None:
    found = place({"a": 10, "b": 0, "c": 10}, {"a": ["c"]}, 100)
    assert (found.shards, found.home, found.replication) == ((("a", "c"),), {"a": 0, "c": 0}, 1)


def test_pairs_are_told_from_both_sides() -> None:
    pairs = Pairs(5)
    pairs.add(1, [0, 1, 4])  # a question about a clip and itself is no pair
    pairs.add(3, [0])
    pairs.finish()
    turned = pairs.turned()
    assert [list(pairs.of(clip)) for clip in range(5)] == [[], [0, 4], [], [0], []]
    assert [list(turned.of(clip)) for clip in range(5)] == [[1, 3], [], [], [], [1]]
    again = Pairs.from_sorted(5, np.array([1, 1, 1, 3]), np.array([0, 1, 4, 0]))
    assert [list(again.of(clip)) for clip in range(5)] == [[], [0, 4], [], [0], []]


def test_the_number_of_bytes_held_for_a_clip_is_small() -> None:
    draw = np.random.default_rng(0)
    num_clips = 20_000
    sizes = draw.integers(1, 9, num_clips)
    others = draw.integers(0, num_clips, num_clips)
    tracemalloc.start()
    try:
        partners = Pairs.from_sorted(num_clips, np.arange(num_clips), others)
        place_clips(sizes, partners, 2_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150 * num_clips


def reason_aqa(bytes_a_second: int) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Sizes and pairs with ReasonAQA's counts: 10 s clips in random pairs, 15 to 30 s clips first in five each."""
    draw = random.Random(0)
    short, long = keys(48_660 + 3_839)[:48_660], keys(48_660 + 3_839)[48_660:]
    sizes = dict.fromkeys(short, 10 * bytes_a_second)
    sizes.update({key: round(draw.uniform(15, 30) * bytes_a_second) for key in long})
    partners = {key: [draw.choice(short)] for key in short}
    partners.update({key: [draw.choice(long) for _ in range(5)] for key in long})
    return sizes, partners


@pytest.mark.parametrize("bytes_a_second", [43_000, 64_000])  # FLAC, 16-bit PCM at 32 kHz
def test_reason_aqa_in_shards_of_a_gigabyte_needs_at_most_a_quarter_more(bytes_a_second: int) -> None:
    sizes, partners = reason_aqa(bytes_a_second)
    placement = place(sizes, partners, 10**9)
    check(placement, sizes, partners, 10**9)
    assert placement.replication <= 1.25
