"""How programs that fail, hang or lie are met: with a stand-in for `java`, so these run without it."""

import os
import sys
import time
from pathlib import Path

import pytest

from mellow_ds.evaluation import java_metrics
from mellow_ds.evaluation.captions import CaptionItem, caption_metrics
from mellow_ds.evaluation.java_metrics import JavaUnavailableError, Meteor, find_java, ptb_tokenize, spice

ITEMS = [("a dog", ["a dog barks"]), ("rain", ["rain", "it rains"])]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a `java` from Python source (`args`: its arguments), beside jars that are empty files."""
    package = tmp_path / "package"
    jars = (java_metrics._PTB_JAR, java_metrics._METEOR_JAR, java_metrics._SPICE_JAR, *java_metrics._SPICE_MODELS)
    for jar in jars:
        (package / jar).parent.mkdir(parents=True, exist_ok=True)
        (package / jar).touch()
    monkeypatch.setattr(java_metrics, "package_folder", lambda: package)

    def make(source: str) -> str:
        program = tmp_path / "java"
        note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys, time\nargs = sys.argv[1:]\n{note}{source}")
        program.chmod(0o755)
        return str(program)

    return make


def _is_running(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_find_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "java").write_text("#!/bin/sh\n")
        (tmp_path / folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java() == str(tmp_path / "home/bin/java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nothing"))
    assert find_java() == str(tmp_path / "path/java")
    monkeypatch.setenv("PATH", "")
    assert find_java() is None


def test_ptb_tokens_lose_punctuation_and_lines_stay_apart(stand_in) -> None:
    java = stand_in("sys.stdout.write(sys.stdin.read().lower().replace(',', ' ,').replace('.', ' .'))")
    assert ptb_tokenize(java, ["A dog, barks.", "", "two\nlines\u2028here"]) == ["a dog barks", "", "two lines here"]


def test_ptb_that_loses_lines_is_not_believed(stand_in) -> None:
    with pytest.raises(JavaUnavailableError, match="gave 1 lines for 3"):
        ptb_tokenize(stand_in("print('a', end='')"), ["a", "b", "c"])


def test_program_that_fails_gives_its_last_line(stand_in) -> None:
    java = stand_in("sys.exit('no memory')")
    with pytest.raises(JavaUnavailableError, match="ended with code 1: no memory"):
        ptb_tokenize(java, ["a"])
    with Meteor(java) as meteor, pytest.raises(JavaUnavailableError, match=r"METEOR failed .*no memory"):
        meteor.score(ITEMS)


@pytest.mark.usefixtures("stand_in")
def test_no_java_and_java_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(JavaUnavailableError, match="no java"):
        ptb_tokenize(None, ["a"])
    with pytest.raises(JavaUnavailableError, match="could not be run"):
        ptb_tokenize(str(tmp_path / "nothing"), ["a"])
    with pytest.raises(JavaUnavailableError, match="could not be started"), Meteor(str(tmp_path / "nothing")):
        pass


def test_hanging_programs_are_ended(stand_in, tmp_path: Path) -> None:
    java = stand_in("time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(JavaUnavailableError, match="did not end within"):
        ptb_tokenize(java, ["a"], timeout=0.5)
    assert not _is_running(tmp_path / "pid")
    with pytest.raises(JavaUnavailableError, match="did not end within"):
        spice(java, ITEMS, timeout=0.5)
    assert not _is_running(tmp_path / "pid")
    with Meteor(java) as meteor, pytest.raises(JavaUnavailableError, match="did not end within"):
        meteor.score(ITEMS, timeout=0.5)
    assert not _is_running(tmp_path / "pid")
    assert time.monotonic() - started < 20


def test_meteor_process_is_gone_after_an_exception(stand_in, tmp_path: Path) -> None:
    def fail() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Meteor(stand_in("time.sleep(60)")):
        fail()
    assert not _is_running(tmp_path / "pid")


def test_meteor_dialogue(stand_in) -> None:
    """The statistics of each item go back to the program, whose last line is the corpus score."""
    java = stand_in(
        "assert args[-6:] == ['-', '-', '-stdio', '-l', 'en', '-norm'], args\n"
        "for line in sys.stdin:\n"
        "    parts = line.strip().split(' ||| ')\n"
        "    if parts[0] == 'SCORE':\n"
        "        print(len(parts) - 2, len(parts[-1]), flush=True)\n"
        "    else:\n"
        "        assert parts == ['EVAL', '1 5', '2 4'], parts\n"
        "        print('0.1\\n0.2\\n0.75', flush=True)\n"
    )
    with Meteor(java) as meteor:
        assert meteor.score(ITEMS) == 0.75
        assert meteor.score(ITEMS) == 0.75  # one program, several corpora


_SPICE = """
source, target = args[args.index('-jar') + 2], args[args.index('-out') + 1]
items = json.load(open(source))
assert items[1] == {'image_id': 1, 'test': 'rain', 'refs': ['rain', 'it rains']}, items
scores = [{'image_id': i['image_id'], 'scores': {'All': {'f': 0.25 + 0.5 * i['image_id']}}} for i in items]
json.dump(scores, open(target, 'w'))
"""


def test_spice_mean(stand_in) -> None:
    assert spice(stand_in(_SPICE), ITEMS) == 0.5


def test_spice_that_writes_nothing(stand_in) -> None:
    with pytest.raises(JavaUnavailableError, match="wrote no scores"):
        spice(stand_in(""), ITEMS)


def test_spice_without_models_starts_nothing(stand_in, tmp_path: Path) -> None:
    (tmp_path / "package" / java_metrics._SPICE_MODELS[1]).unlink()
    with pytest.raises(JavaUnavailableError, match="models are not installed"):
        spice(stand_in(_SPICE), ITEMS)
    assert not (tmp_path / "pid").exists()


def test_spider_is_the_mean_of_cider_and_spice(stand_in) -> None:
    java = stand_in(
        "if '-stdio' in args or '-cp' in args:\n    sys.exit(3)\n" + _SPICE,
    )
    items = [CaptionItem("a dog", ("a dog barks",)), CaptionItem("rain", ("rain", "it rains"))]
    result = caption_metrics({"s": items}, java=java)["s"]
    scores = result["scores"]
    assert result["tokenizer"] == "plain"
    assert "code 3" in result["reasons"]["ptb"]
    assert scores["METEOR"] is None
    assert scores["SPICE"] == 0.5
    assert scores["SPIDEr"] == pytest.approx((scores["CIDEr"] + 0.5) / 2)
