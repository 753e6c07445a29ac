"""`mellow-ds doctor` as it is typed: shipped recipes, exit codes, JSON, and what it cannot find out."""

import json
from pathlib import Path

import pytest

from mellow_ds.cli.main import main
from mellow_ds.config.load import load_run_config, recipe_names

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINING = [name for name in recipe_names() if load_run_config(name).mode == "train"]


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    """Exit code, and what it says as JSON."""
    code = main(["doctor", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def codes(said: dict, severity: str = "") -> set[str]:
    return {f["code"] for f in said["findings"] if not severity or f["severity"] == severity}


@pytest.mark.parametrize("name", TRAINING)
def test_nothing_stops_a_shipped_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, few_shards, name) -> None:
    code, said = doctor(capsys, "--config", name, "--data.shards", few_shards, "--save-dir", tmp_path,
                        "--world", 2, "--gpu-memory", 80, "--train.warmup_steps", 0)  # fmt: skip
    assert code == 0, said["findings"]
    assert codes(said, "stops") == set()
    assert said["summary"]["ranks"].startswith("2")
    assert "texts-not-read" not in codes(said)
    assert "of them learned" in said["summary"]["tokens a row"]


def test_the_report_says_what_stops_first_and_then_the_arithmetic(capsys, tmp_path: Path, few_shards) -> None:
    code = main(["doctor", "--config", "quickstart", "--data.shards", str(few_shards), "--save-dir", str(tmp_path),
                 "--world", "64"])  # fmt: skip
    text = capsys.readouterr().out
    assert code == 2
    assert text.index("WILL NOT WORK") < text.index("train.global_batch_size is 32, but 64 ranks train")
    assert text.index("cure: raise train.global_batch_size") < text.index("ARITHMETIC")


def test_memory_of_gpus_elsewhere(capsys, tmp_path: Path, few_shards) -> None:
    run = ["--config", "mellow", "--data.shards", few_shards, "--save-dir", tmp_path, "--world", 8]
    code, said = doctor(capsys, *run, "--gpu-memory", 2)
    assert code == 2
    assert codes(said, "stops") == {"memory-too-small"}
    assert "deepspeed, stage 2, bfloat16" in said["summary"]["engine"]
    code, said = doctor(capsys, *run, "--gpu-memory", 80, "--deepspeed_config", "ds_configs/zero3.json")
    assert code == 0
    assert "stage-too-high" in codes(said, "slow")


def test_texts_are_counted_with_the_tokenizer_that_the_run_will_make(capsys, tmp_path: Path, few_shards) -> None:
    _, said = doctor(capsys, "--config", "quickstart", "--data.shards", few_shards, "--save-dir", tmp_path,
                     "--data.ip_text_len", 3)  # fmt: skip
    (cut,) = [f for f in said["findings"] if f["code"] == "prompts-cut"]
    assert "counted with the run's tokenizer" in cut["what"]


def test_what_cannot_be_found_out_is_said(capsys, tmp_path: Path, few_shards) -> None:
    code, said = doctor(capsys, "--config", "mellow", "--save-dir", tmp_path)
    assert code == 2
    assert codes(said, "stops") == {"no-shards"}
    code, said = doctor(capsys, "--config", "mellow", "--data.shards", tmp_path / "none", "--save-dir", tmp_path)
    assert code == 2
    assert "refused" in codes(said, "stops")
    code, said = doctor(capsys, "--config", "mellow", "--data.shards", few_shards, "--save-dir", tmp_path,
                        "--model.decoder.text_decoder", "nobody/nothing")  # fmt: skip
    assert code == 0
    assert "sizes-unknown" in codes(said, "note")
    (tmp_path / "q.json").write_text("[]")
    _, said = doctor(capsys, "--config", "mellow", "--data.datafiles", tmp_path / "q.json", "--data.datapath", tmp_path,
                     "--save-dir", tmp_path)  # fmt: skip
    assert "packed-first" in codes(said, "note")


def test_what_the_run_would_refuse_is_found(capsys, tmp_path: Path, few_shards) -> None:
    run = ["--config", "mellow", "--data.shards", few_shards, "--save-dir", tmp_path]
    code, said = doctor(capsys, *run, "--model.encoder.d_proj", 500)
    assert code == 2
    assert "model.encoder.d_proj is 500" in said["findings"][0]["what"]
    code, said = doctor(capsys, *run, "--checkpoint_path", tmp_path / "no")
    assert code == 2
    assert "is not there" in said["findings"][0]["what"]


def test_remote_shards_are_not_downloaded(capsys, tmp_path: Path, few_shards, monkeypatch) -> None:
    from mellow_ds.data.reader import ShardReader

    monkeypatch.setattr(ShardReader, "is_remote", True)
    _, said = doctor(capsys, "--config", "quickstart", "--data.shards", few_shards, "--save-dir", tmp_path)
    assert "texts-not-read" in codes(said, "note")


@pytest.mark.parametrize("options", [["--world", "-1"], ["--gpu-memory", "-3"], ["--data.shard", "a"]])
def test_wrong_options_are_one_line(capsys, options) -> None:
    assert main(["doctor", "--config", "mellow", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
