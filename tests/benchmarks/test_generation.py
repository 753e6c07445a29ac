"""The benchmark of generation at minute sizes: what it runs, what it writes, how it compares. Not how fast it is."""

import json

import generation
import pytest


def test_it_writes_every_round_of_all_variants(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--tiny", "--rounds", "2", "--batch-size", "3", "--tokens", "3", "--threads", "1", "--out", str(out)]
    generation.main(arguments)
    result = json.loads(out.read_text())
    names = ["original recipe", "33 tokens a clip", "129 tokens a clip"]
    assert list(result["seconds"]) == names
    assert all(len(values) == 2 and min(values) > 0 for values in result["seconds"].values())
    assert result["original_tokens_of_rounds"] == [1, 2]
    assert result["answer_seconds"]["original recipe"] == pytest.approx(sum(result["seconds"]["original recipe"]))
    assert result["command"] == "python benchmarks/generation.py " + " ".join(arguments)
    table = capsys.readouterr().out
    assert all(name in table for name in names)


@pytest.mark.parametrize(("tokens", "parts"), [(32, 4), (32, 5), (7, 7), (3, 2)])
def test_the_parts_hold_all_tokens_and_differ_by_one_at_most(tokens, parts):
    sizes = generation.part_sizes(tokens, parts)
    assert len(sizes) == parts
    assert sum(sizes) == tokens
    assert max(sizes) - min(sizes) <= 1


def test_a_part_takes_its_tokens_from_where_the_last_one_stopped():
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield number

    run = generation.in_parts(stream(), tokens=5, parts=2)
    assert run(0) >= 0
    assert taken == [0, 1]
    run(1)
    assert taken == [0, 1, 2, 3, 4]


def test_the_original_s_parts_add_up():
    compared = generation.compare({"original recipe": [30.0, 20.0, 10.0], "x": [2.0, 3.0, 5.0]})
    assert compared["answer_seconds"] == {"original recipe": 60.0, "x": 3.0}
    assert compared["times_as_fast"] == {"x": 20.0}
    assert compared["times_as_fast_slowest_round"] == {"x": 12.0}


def test_fewer_tokens_than_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        generation.parse_arguments(["--tokens", "2", "--rounds", "3"])
    assert "cannot be dealt out" in capsys.readouterr().err
