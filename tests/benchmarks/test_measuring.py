"""Turns, the result file and the table."""

import json
import re
import subprocess

import measuring
import pytest


def test_runs_take_turns_and_each_keeps_its_own_seconds():
    called = []

    def run(name, seconds):
        return lambda number: called.append((name, number)) or seconds + number

    seconds = measuring.take_turns({"a": run("a", 10.0), "b": run("b", 20.0)}, rounds=3)
    assert called == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seconds == {"a": [10, 11, 12], "b": [20, 21, 22]}


def test_the_result_file_reads_back(tmp_path):
    result = {"a": 1, "b": {"c": [1.5, 2.5], "d": {"e": None}, "f": {}}, "g": [{"h": 1}, {"h": 2}], "i": 'quote "'}
    measuring.write_result(tmp_path / "new" / "r.json", result)
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == result


def test_the_context_says_how_to_repeat_it():
    about = measuring.context("x.py", ["--rounds", "2"], threads=3)
    assert about["command"] == "python benchmarks/x.py --rounds 2"
    assert about["hardware"]["threads"] == 3
    assert about["hardware"]["cpu"]
    assert {"python", "torch", "torchaudio", "transformers"} == set(about["versions"])
    assert about["date"].endswith("+00:00")
    assert about["commit"] == "unknown" or re.fullmatch(r"[0-9a-f]{40}", about["commit"])


def test_the_commit_stands_alone_and_what_differs_from_it_beside(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )

    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    assert measuring.context("x.py", [], 1)["commit"] == "unknown"  # no checkout
    git("init", "-q")
    for name in ("kept.py", "a file.py", "removed.py"):
        (tmp_path / name).write_text("1")
    git("add", "-A")
    git("commit", "-qm", "all")
    head = git("rev-parse", "HEAD").stdout.strip()
    about = measuring.context("x.py", [], 1)
    assert (about["commit"], about["changed_files"]) == (head, [])
    (tmp_path / "a file.py").write_text("2")
    (tmp_path / "removed.py").unlink()
    (tmp_path / "untracked.py").write_text("3")
    about = measuring.context("x.py", [], 1)
    assert (about["commit"], about["changed_files"]) == (head, ["a file.py", "removed.py"])


def test_the_table_is_markdown_with_aligned_columns(capsys):
    measuring.print_table(["what", "s"], [["long name", "1.00"], ["b", "10.00"]])
    assert capsys.readouterr().out.splitlines() == [
        "| what      |     s |",
        "| --------- | ----: |",
        "| long name |  1.00 |",
        "| b         | 10.00 |",
    ]


def test_counts_are_at_least_one():
    with pytest.raises(Exception, match="less than 1"):
        measuring.positive("0")
