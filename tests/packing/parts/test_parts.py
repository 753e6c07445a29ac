"""Parts of a build: every record in one of them, parts of like size, few pairs that cross."""

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.parts import split as split_module
from mellow_ds.packing.parts.split import PathGraph, part_folder, share_of_part, split_paths
from mellow_ds.packing.records import Record, RecordStream, Rejection
from mellow_ds.packing.settings import BuildSettings


def pairs(count: int, seed: int = 0) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Files of 100 to 300 bytes, each first in a pair with a random one."""
    draw = random.Random(seed)
    names = [f"{number}.wav" for number in range(count)]
    return {name: draw.randint(100, 300) for name in names}, {name: [draw.choice(names)] for name in names}


def split(sizes: dict[str, int], partners: dict[str, list[str]], num_parts: int) -> dict[str, int]:
    """`split_paths` of files by their paths."""
    with Catalogue(None) as catalogue:
        numbers = {path: catalogue.number_of(path) for path in sizes}
        graph = PathGraph()
        for path, others in partners.items():
            graph.add([numbers[path], *(numbers[other] for other in others)])
        part_of = split_paths(np.array(list(sizes.values()), np.int64), catalogue, *graph.pairs(), num_parts)
        return {path: int(part_of[number]) for path, number in numbers.items()}


@pytest.mark.parametrize("num_parts", [1, 2, 7, 40])
def test_parts_are_of_like_size_and_few_pairs_cross(num_parts: int) -> None:
    sizes, partners = pairs(4_000)
    part_of = split(sizes, partners, num_parts)
    assert set(part_of) == set(sizes)
    stored = [set[str]() for _ in range(num_parts)]
    for name, part in part_of.items():
        stored[part] |= {name, *partners[name]}
    loads = [sum(sizes[name] for name in part) for part in stored]
    assert max(loads) <= 1.4 * sum(loads) / num_parts
    # dealt out by chance, all but one in `num_parts` of the pairs would cross
    by_chance = [set[str]() for _ in range(num_parts)]
    for name in sizes:
        part = int(hashlib.sha256(name.encode()).hexdigest(), 16) % num_parts
        by_chance[part] |= {name, *partners[name]}
    copies, copies_by_chance = (sum(map(len, dealt)) - len(sizes) for dealt in (stored, by_chance))
    assert copies <= 0.3 * copies_by_chance


def test_the_split_does_not_hang_on_the_order_of_its_arguments() -> None:
    sizes, partners = pairs(300)
    turned = dict(reversed(sizes.items())), dict(reversed(partners.items()))
    assert split(*turned, 5) == split(sizes, partners, 5)


def test_more_parts_than_files_leave_some_empty() -> None:
    part_of = split({"a": 10, "b": 10, "gone": 0}, {"a": ["b"]}, 50)
    assert all(0 <= part < 50 for part in part_of.values())
    assert split({}, {}, 3) == {}


def write(folder: Path, count: int) -> Path:
    records: list[object] = []
    for number in range(count):
        second = f"{(number * 7) % count}.wav" if number % 2 else ""
        records.append({"filepath1": f"{number}.wav", "filepath2": second, "input": "what?", "answer": str(number)})
        records.append("no record")
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def test_every_record_and_every_rejection_is_in_one_part(tmp_path: Path) -> None:
    stream = RecordStream([write(tmp_path, 40)])
    found: list[list[Record | Rejection]] = []
    with Catalogue(None) as catalogue:
        graph = PathGraph()
        for record in stream:
            if isinstance(record, Record):
                graph.add([catalogue.number_of(path) for path in record.paths])
        assert {path for _, path in catalogue.in_order()} == {f"{number}.wav" for number in range(40)}
        sizes = np.full(len(catalogue), 100)
        for part in range(3):
            share = share_of_part(graph, sizes, catalogue, BuildSettings(num_parts=3, part=part))
            found.append(list(share.records(stream, catalogue)))
            asked = {path for record in found[-1] if isinstance(record, Record) for path in record.paths}
            assert {path for number, path in catalogue.in_order() if share.files[number]} == asked

    def numbers(kind: type, records: Iterable[Record | Rejection]) -> list[int]:
        return [
            record.number if isinstance(record, Record) else record.record
            for record in records
            if isinstance(record, kind)
        ]

    assert sorted(number for part in found for number in numbers(Record, part)) == list(range(0, 80, 2))
    assert sorted(number for part in found for number in numbers(Rejection, part)) == list(range(1, 80, 2))
    assert all(numbers(Record, part) for part in found)
    homes = [{record.paths[0] for record in part if isinstance(record, Record)} for part in found]
    assert sum(map(len, homes)) == len(set.union(*homes)), "a path is in front in one part only"


def test_a_graph_knows_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "_PAIRS_AT_ONCE", 10)
    draw = random.Random(0)
    asked = [[draw.randrange(30) for _ in range(draw.randint(1, 4))] for _ in range(1_000)]
    graph = PathGraph()
    for paths in asked:
        graph.add(paths)
    wanted = sorted({(first, other) for first, *others in asked for other in others})
    assert np.stack(graph.pairs(), axis=1).tolist() == [list(pair) for pair in wanted]
    assert [bool(flag) for flag in graph.is_first] == [
        any(first == number for first, *_ in asked) for number in range(len(graph.is_first))
    ]


def test_a_part_has_a_folder_of_its_own() -> None:
    assert part_folder(Path("out"), BuildSettings(num_parts=16, part=3)) == Path("out/part-00003-of-00016")
    assert part_folder(Path("out"), BuildSettings()) == Path("out")
