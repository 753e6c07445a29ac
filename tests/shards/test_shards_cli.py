"""The command line of the packing room: exit codes, one clear line, and help that answers at once."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_ds.errors import EXIT_DONE, EXIT_USER
from shards.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three tones and four records."""
    names = ["a.wav", "b.wav", "c.wav"]
    for number, name in enumerate(names):
        wave = 0.3 * np.sin(np.arange(800) * 0.05 * (number + 1))
        soundfile.write(tmp_path / name, wave, 8_000)
    records = [{"filepath1": name, "input": "what?", "answer": name, "subtype": "open"} for name in names]
    records.append({"clips": ["a.wav", "b.wav"], "input": "same?", "answer": "no", "subtype": "pair"})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path


def build_arguments(corpus: Path, *more: str) -> list[str]:
    given = ["--json", str(corpus / "train.json"), "--audio-root", str(corpus), "--out", str(corpus / "out")]
    return ["build", *given, "--workers", "1", *more]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shards", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "arguments", [[], ["build"], ["merge"], ["verify"], ["inspect"], ["audit"], ["plan"], ["synthesize"]]
)
def test_help_has_examples_and_costs_less_than_half_a_second(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*arguments, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == EXIT_DONE
    assert "examples:\n  mellow-shards" in done.stdout
    # CPU time, so that a busy machine does not fail it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from shards.cli import _parser; _parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "soundfile", "webdataset"} & set(done.stdout.split())


def test_build_verify_and_inspect_a_corpus(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_arguments(corpus)) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "is built" in printed
    assert [line.split()[1] for line in printed.splitlines()[1:3]] == ["3", "4"]
    assert main(build_arguments(corpus)) == EXIT_DONE
    assert "nothing to do" in capsys.readouterr().out
    assert main(["verify", str(corpus / "out"), "--workers", "1"]) == EXIT_DONE
    assert "is well" in capsys.readouterr().out
    assert main(["inspect", str(corpus / "out")]) == EXIT_DONE
    assert "open" in capsys.readouterr().out


def test_rejected_records_are_counted_by_reason(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "b.wav").unlink()
    assert main(build_arguments(corpus)) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "error: 2 of 4 records cannot be packed (50.00%, allowed 1.00%): 2 x file is missing"
    )
    assert main(build_arguments(corpus, "--max-rejected", "0.5")) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "2 file is missing" in printed
    assert "rejected.jsonl names each" in printed


def test_two_json_files_are_packed_together(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = corpus / "more.json"
    other.write_text(json.dumps([{"filepath1": "c.wav", "input": "again?", "answer": "c"}]))
    assert main(build_arguments(corpus, "--json", str(other))) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[2].split() == ["questions", "5"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--audio-root", "/nowhere"], "audio root /nowhere is not a folder"),
        (["--json", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--workers", "-2"], "--workers is -2"),
        (["--sample-rate", "1"], "--sample-rate is 1 Hz"),
        (["--max-rejected", "2"], "--max-rejected is 2.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    corpus: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    assert main(build_arguments(corpus, *change)) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert named in captured.err


def test_damage_and_missing_folders_end_with_code_2(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_arguments(corpus)) == EXIT_DONE
    os.truncate(corpus / "out" / "shard-000000.tar", 3_000)
    capsys.readouterr()
    assert main(["verify", str(corpus / "out")]) == EXIT_USER
    captured = capsys.readouterr()
    assert "has 3000 bytes" in captured.out
    assert captured.err.startswith(f"error: {corpus / 'out'} has ")
    for command in ("verify", "inspect"):
        assert main([command, str(corpus / "nowhere")]) == EXIT_USER
        assert "nowhere is not there" in capsys.readouterr().err


def test_wrong_arguments_end_with_code_2() -> None:
    for arguments in ([], ["pack"], ["build"], ["verify", "a", "--workers", "many"]):
        done = run(*arguments)
        assert done.returncode == EXIT_USER
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_synthetic_corpus_is_made_packed_and_verified(tmp_path: Path) -> None:
    made = run(
        "synthesize", "--out", str(tmp_path / "corpus"), "--train-clips", "12", "--val-clips", "8", "--test-clips", "8"
    )
    assert made.returncode == EXIT_DONE, made.stderr
    for split in ("train", "val", "test"):
        root, out = str(tmp_path / "corpus"), str(tmp_path / split)
        built = run(
            "build", "--json", f"{root}/{split}.json", "--audio-root", root, "--out", out, "--max-rejected", "0"
        )
        assert built.returncode == EXIT_DONE, built.stderr
        assert run("verify", out).returncode == EXIT_DONE


def test_parts_are_built_and_merged(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("0", "1"):
        assert main(build_arguments(corpus, "--num-parts", "2", "--part", part)) == EXIT_DONE
    printed = capsys.readouterr().out
    folders = [str(corpus / "out" / f"part-0000{part}-of-00002") for part in range(2)]
    assert f"{folders[1]} is built" in printed
    assert main(["merge", *folders, "--out", str(corpus / "out")]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "is joined from 2 parts" in printed
    assert [line.split()[1] for line in printed.splitlines()[1:3]] == ["3", "4"]
    assert main(["verify", str(corpus / "out"), "--workers", "1"]) == EXIT_DONE
    capsys.readouterr()
    assert main(["merge", folders[1], "--out", str(corpus / "other")]) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 1 of 2 parts are missing: 0;")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--num-parts", "2"], "--num-parts and --part go together"),
        (["--part", "0"], "--num-parts and --part go together"),
        (["--num-parts", "2", "--part", "2"], "--part is 2; it must be from 0 to 1"),
        (["--num-parts", "0", "--part", "0"], "--num-parts is 0; it must be 1 or more"),
        (["--codec", "opus", "--sample-rate", "96000"], "opus stores 48000 Hz"),
        (["--drop-list", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    ],
)
def test_a_mistake_about_parts_codec_or_drop_list_is_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    assert main(build_arguments(corpus, *given)) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_what_the_drop_list_takes_out_has_a_line_of_its_own(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = hashlib.sha256((corpus / "b.wav").read_bytes()).hexdigest()[:32]
    (corpus / "drop.jsonl").write_text(json.dumps({"kind": "clip", "id": key, "reason": "silent"}))
    assert main(build_arguments(corpus, "--drop-list", str(corpus / "drop.jsonl"))) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "dropped      2 questions by the drop list (2 with a clip, 0 by name)" in printed
    assert "rejected     0 records" in printed


def test_opus_shards_are_built_and_verified(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_arguments(corpus, "--codec", "opus")) == EXIT_DONE
    assert main(["verify", str(corpus / "out"), "--workers", "1"]) == EXIT_DONE
    assert "is well" in capsys.readouterr().out
