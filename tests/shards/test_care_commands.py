"""`mellow-shards audit`, `inspect --plot` and `plan` as commands: what they print and write, and their exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_ds.errors import EXIT_DONE, EXIT_USER
from mellow_ds.packing.survey import content_key
from shards.cli import main

RATE = 8_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards train and val: six noises, one silent, one of train in val too."""
    root = tmp_path_factory.mktemp("care")
    for number in range(6):
        wave = np.random.default_rng(number).uniform(-0.3, 0.3, 800) * (number != 5)
        soundfile.write(root / f"{number}.wav", wave, RATE, subtype="PCM_16")
    for split, clips in (("train", range(1, 6)), ("val", range(2))):
        records = [
            {"filepath1": f"{n}.wav", "input": "what?", "answer": f"noise {n}", "subtype": "open"} for n in clips
        ]
        (root / f"{split}.json").write_text(json.dumps(records))
        given = ["--json", str(root / f"{split}.json"), "--audio-root", str(root), "--out", str(root / split)]
        assert main(["build", *given, "--workers", "1", "--sample-rate", str(RATE)]) == EXIT_DONE
    return root


def key(root: Path, number: int) -> str:
    return content_key((root / f"{number}.wav").read_bytes())


def test_audit_prints_a_table_and_writes_json_and_drop_lists(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("audit.json", "train.jsonl", "val.jsonl")}
    given = ["audit", f"train={folders / 'train'}", f"val={folders / 'val'}", "--workers", "1"]
    more = ["--json", str(files["audit.json"]), "--drop-list", str(files["train.jsonl"])]
    assert main([*given, *more, "--drop-list", f"val={files['val.jsonl']}"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "! silent" in printed
    assert "5.wav" in printed
    assert "2 clips and 1 questions to leave out of train" in printed
    lines = [json.loads(line) for line in files["train.jsonl"].read_text().splitlines()]
    assert {(line["kind"], line["id"]) for line in lines if line["kind"] == "clip"} == {
        ("clip", key(folders, 1)),
        ("clip", key(folders, 5)),
    }
    assert files["val.jsonl"].read_text() == ""
    content = json.loads(files["audit.json"].read_text())
    assert content["serious"] is True
    assert content["coverage"] == {"open": {"train": 5, "val": 2}}


def test_strict_ends_with_2_where_something_serious_is_found(folders: Path) -> None:
    assert main(["audit", str(folders / "train"), "--strict", "--workers", "1"]) == EXIT_USER
    assert main(["audit", str(folders / "val"), "--strict", "--workers", "1"]) == EXIT_DONE
    assert main(["audit", str(folders / "train"), "--strict", "--workers", "1", "--silent-peak", "-100"]) == EXIT_USER


def test_what_goes_on_the_drop_list_is_chosen(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "drop.jsonl"
    given = ["audit", f"train={folders / 'train'}", f"val={folders / 'val'}", "--workers", "1"]
    assert main([*given, "--drop-list", str(out), "--drop", "shared-clip"]) == EXIT_DONE
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [key(folders, 1)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["audit", "nowhere"], "nowhere is not there"),
        (["audit", "a/x", "b/x"], "two folders are called 'x'"),
        (["audit", "x", "--clipped-share", "2"], "--clipped-share is 2"),
        (["audit", "x", "--drop-list", "a", "--drop-list", "b"], "--drop-list is given twice"),
        (["audit", "x", "--drop-list", "val=a"], "no split is called val; they are x"),
        (["audit", "http://host/x"], "http://host/x is an address"),
        (["plan", "--clips", "0", "--seconds", "1", "--questions", "2", "--consumes", "5"], "--clips is 0"),
        (["plan", "--clips", "5", "--consumes", "9"], "--seconds and --questions missing"),
        (["plan", "x", "--clips", "5", "--consumes", "9"], "--clips is given beside x"),
        (["plan", "--clips", "5", "--seconds", "1", "--questions", "2", "--consumes", "0"], "--consumes is 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_inspect_prints_lengths_and_levels_and_draws(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "train.png"
    assert main(["inspect", str(folders / "train"), "--plot", str(picture)]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "words a prompt" in printed
    assert "-120.0 / " in printed  # the silent one
    assert picture.stat().st_size > 10_000
    assert main(["inspect", str(folders / "train"), "--levels", "0"]) == EXIT_DONE
    assert "level" not in capsys.readouterr().out


def test_plan_prints_and_writes_the_plan(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    given = ["--nodes", "2", "--gpus", "4", "--consumes", "900", "--json", str(out)]
    assert main(["plan", "--clips", "52499", "--seconds", "11", "--questions", "18.4", *given]) == EXIT_DONE
    assert "GPUs busy" in capsys.readouterr().out
    assert json.loads(out.read_text())["bottleneck"] == "loader processes"
    assert main(["plan", str(folders / "train"), *given]) == EXIT_DONE
    content = json.loads(out.read_text())
    assert (content["corpus"]["num_clips"], content["num_shards"]) == (5, 1)
    assert content["demand"]["codec"] == "flac"


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_addresses_are_refused_by_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "http://host/shards"])
    assert stopped.value.code == EXIT_USER
    assert "http://host/shards is an address: this command reads folders" in capsys.readouterr().err
