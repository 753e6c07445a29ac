"""Parts of a build: every record in one of them, parts of like size, few pairs that cross."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from mellow_ds.packing.parts.split import PathGraph, part_folder, read_graph, read_part, split_paths
from mellow_ds.packing.settings import BuildSettings


def pairs(count: int, seed: int = 0) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Files of 100 to 300 bytes, each first in a pair with a random one."""
    draw = random.Random(seed)
    names = [f"{number}.wav" for number in range(count)]
    return {name: draw.randint(100, 300) for name in names}, {name: [draw.choice(names)] for name in names}


@pytest.mark.parametrize("num_parts", [1, 2, 7, 40])
def test_parts_are_of_like_size_and_few_pairs_cross(num_parts: int) -> None:
    sizes, partners = pairs(4_000)
    part_of = split_paths(sizes, partners, num_parts)
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
    assert split_paths(*turned, 5) == split_paths(sizes, partners, 5)


def test_more_parts_than_files_leave_some_empty() -> None:
    part_of = split_paths({"a": 10, "b": 10, "gone": 0}, {"a": ["b"]}, 50)
    assert all(0 <= part < 50 for part in part_of.values())
    assert split_paths({}, {}, 3) == {}


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
    path = write(tmp_path, 40)
    graph, whole = read_graph([path])
    assert graph.paths == {f"{number}.wav" for number in range(40)}
    assert whole.records == whole.rejections == []
    part_of = split_paths(dict.fromkeys(graph.paths, 100), graph.partners, 3)
    found = [read_part([path], part_of, BuildSettings(num_parts=3, part=part)) for part in range(3)]
    assert sorted(record.number for part in found for record in part.records) == list(range(0, 80, 2))
    assert sorted(rejection.record for part in found for rejection in part.rejections) == list(range(1, 80, 2))
    assert all(part.records for part in found)
    assert all(part.sources == whole.sources for part in found), "each names the whole input"
    for number, part in enumerate(found):
        assert all(part_of[record.paths[0]] == number for record in part.records)


def test_a_graph_keeps_no_record(tmp_path: Path) -> None:
    graph = PathGraph()
    assert graph.add(read_part([write(tmp_path, 2)], {"0.wav": 0}, BuildSettings(num_parts=1)).records[0]) is False
    assert (graph.paths, graph.partners) == ({"0.wav"}, {})


def test_a_part_has_a_folder_of_its_own() -> None:
    assert part_folder(Path("out"), BuildSettings(num_parts=16, part=3)) == Path("out/part-00003-of-00016")
    assert part_folder(Path("out"), BuildSettings()) == Path("out")
