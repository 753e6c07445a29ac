"""What people get wrong: one clear line, exit code 2, no traceback, before torch is imported where that can be."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mellow_ds.cli.main import main
from mellow_ds.cli.train import main as train_main
from mellow_ds.config.schema import RunConfig
from mellow_ds.log import setup_logging
from mellow_ds.world import World
from shards.cli import main as shards_main
from tests.cli.runs import ROOT
from tests.guide import quoted

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that train.py says before it ends with code 2."""
    assert train_main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_unknown_recipe_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'digits'?" in refused(capsys, "--config", "digit")
    assert "did you mean train.batch_size?" in refused(capsys, "--config", "digits", "--train.batchsize", 3)
    assert "stands alone" in refused(capsys, "--config", "digits", "train.batch_size=3")
    assert "--train.batch_size has no value" in refused(capsys, "--config", "digits", "--train.batch_size")


def test_missing_shards_name_the_command_that_makes_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "--config", "digits", "--data.datafiles", "a.json")
    assert quoted("data.shards is empty") in line
    assert "mellow-shards build --json a.json --audio-root AUDIO_FOLDER --out SHARDS" in line
    missing = tmp_path / "none"
    assert f"shard folder {missing} is not there" in refused(capsys, "--config", "digits", "--data.shards", missing)


def test_manifest_of_another_version_or_rate(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    manifest = json.loads((shards / "train" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    line = refused(capsys, "--config", "quickstart", "--data.shards", tmp_path)
    assert "format version 99; this program reads version 1" in line
    line = refused(capsys, "--config", "quickstart", "--data.shards", shards / "train", "--data.sampling_rate", 16000)
    assert quoted("holds audio at 32000 Hz but data.sampling_rate is 16000") in line


def test_global_batch_below_the_world(
    capsys: pytest.CaptureFixture[str], shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "40")
    line = refused(capsys, "--config", "quickstart", "--data.shards", shards / "train")
    assert quoted("train.global_batch_size is 32, but the run has 40 ranks") in line


def test_other_ranks_do_not_repeat_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_main(["--config", "nothing"]) == 2
    assert capsys.readouterr().err == ""


def test_evaluation_without_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs --checkpoint_path" in refused(capsys, "--config", "mellow-eval")
    line = refused(capsys, "--config", "mellow-eval", "--checkpoint_path", tmp_path / "no")
    assert "is not there: name a step folder" in line


def test_commands_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", "nowhere", "--audio", "no.wav", "--prompt", "?"]) == 2
    assert "error: --audio no.wav is not there" in capsys.readouterr().err
    assert main(["convert", "--from-mellow", "no.ckpt", "--out", "x"]) == 2
    assert "--from-mellow no.ckpt is not there" in capsys.readouterr().err
    assert main(["report", "no-run"]) == 2
    assert "run folder no-run is not there" in capsys.readouterr().err
    assert main(["report", "docs"]) == 2
    assert "docs has no evaluation results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (shards_main, "build --jsn x --audio-root y --out z: --jsn is not one of its options; did you mean --json?"),
        (shards_main, "build --json x --audio-root y --out z --nonsense 3: --nonsense is not one of its options"),
        (shards_main, "build --json x --audio-root y: the following arguments are required: --out"),
        (main, "generate --chekpoint=x: --chekpoint is not one of its options; did you mean --checkpoint?"),
        (main, "report a b: unrecognized arguments: b"),
        (main, "launch --num-per-host x -- train.py: argument --num-per-host: invalid int value: 'x'"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_one_that_was_meant(
    command: Callable[[list[str]], int], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, _, message = line.partition(": ")
    words = given.split()
    with pytest.raises(SystemExit) as ended:
        command(words)
    program = f"{'mellow-ds' if command is main else 'mellow-shards'} {words[0]}"
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {program}: {message}; see {program} --help\n"


def test_an_unexpected_fault_stands_in_the_log_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path
) -> None:
    def fail(_config: RunConfig, world: World) -> int:
        setup_logging(world, tmp_path / "log.txt")
        raise ValueError("no good")

    monkeypatch.setattr("mellow_ds.cli.train.run", fail)
    assert train_main(["--config", "quickstart", "--data.shards", str(shards / "train")]) == 1
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: unexpected fault, see the traceback above: ValueError: no good")


def test_a_python_without_the_packages_is_named() -> None:
    command = [sys.executable, "-S", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "source .venv/bin/activate first" in done.stderr


def test_wrong_configurations_do_not_wait_for_torch() -> None:
    code = "import sys; from mellow_ds.cli.train import main; code = main(['--config', 'digits']); "
    code += "sys.exit(10 if 'torch' in sys.modules else code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 2
