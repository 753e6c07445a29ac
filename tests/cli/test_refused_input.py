"""Input that is found out to be wrong only once a run reads it: one clear line, code 2, no traceback, nothing lost."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.model.tokenizer import train_tokenizer
from tests.cli.damage import damage_audio, sample_keys
from tests.cli.runs import TINY, Done, forked
from tests.guide import quoted

pytestmark = pytest.mark.slow


def only_line(done: Done) -> str:
    """What a command that ends with code 2 says is wrong: once, and no traceback."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert done.stderr.splitlines()[-1] == errors[0]  # and nothing after it
    return errors[0]


def training(folder: Path, run: Path, *more: object) -> list[object]:
    return ["--config", "quickstart", "--data.shards", folder, "--save-dir", run, *TINY, *more]


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    shutil.copytree(shards / "train", tmp_path / "shards")
    return tmp_path / "shards"


def test_a_shard_of_another_size_than_its_manifest_says(own_shards: Path, tmp_path: Path) -> None:
    shard = own_shards / "shard-000000.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 512)
    (done,) = forked("train.py", *training(own_shards, tmp_path / "run"))
    line = only_line(done)
    assert str(shard) in line
    assert f"{size - 512:,}".replace(",", "") in line.replace(",", "")
    assert str(size) in line.replace(",", "")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_sample_stops_training_and_keeps_what_was_saved(own_shards: Path, tmp_path: Path) -> None:
    """By the default data.max_bad_fraction of 0, at the first one that is read."""
    run = tmp_path / "run"
    (whole,) = forked("train.py", *training(own_shards, run, "--train.stop_at_step", 3))
    assert whole.returncode == 0, whole.stderr[-3000:]
    shard = own_shards / "shard-000000.tar"
    keys = sample_keys(shard)
    for key in keys:
        damage_audio(shard, key)
    (done,) = forked("train.py", *training(own_shards, run))
    line = only_line(done)
    assert any(f"{shard}, sample {key} at offset " in line for key in keys)
    assert "checksum" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    verify_checkpoint(run / "checkpoints" / "step-000003")


def test_damaged_samples_up_to_the_allowed_share_are_left_out_and_named(own_shards: Path, tmp_path: Path) -> None:
    key = sample_keys(own_shards / "shard-000000.tar")[5]
    damage_audio(own_shards / "shard-000000.tar", key)
    # 26 steps of 4 examples: all 104, so that the sample is read
    arguments = training(own_shards, tmp_path / "run", "--train.max_steps", 26, "--train.save_every_steps", 0)
    (done,) = forked("train.py", *arguments, "--data.max_bad_fraction", 0.5)
    assert done.returncode == 0, done.stderr[-3000:]
    warned = [line for line in done.stderr.splitlines() if "left out bad sample number 1 (checksum)" in line]
    assert len(warned) == 1
    assert key in warned[0]
    # more than the share: one of the 104 questions is more than a thousandth
    (done,) = forked("train.py", *training(own_shards, tmp_path / "other", "--data.max_bad_fraction", 0.001,
                                           "--train.max_steps", 26))  # fmt: skip
    line = only_line(done)
    assert "more than data.max_bad_fraction (0.001) allows" in line
    assert key in line


def test_a_damaged_sample_stops_evaluation_whatever_the_share(straight: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    shutil.copytree(shards / "test", folder)
    key = sample_keys(folder / "shard-000000.tar")[2]
    damage_audio(folder / "shard-000000.tar", key)
    (done,) = forked(
        "mellow-ds", "evaluate", "--config", "quickstart", "--checkpoint_path", straight / "checkpoints/step-000006",
        "--data.eval_shards", folder, "--save-dir", tmp_path / "run", *TINY, "--data.max_bad_fraction", 0.9,
    )  # fmt: skip
    line = only_line(done)
    assert f"sample {key} at offset " in line
    assert not list((tmp_path / "run").glob("evaluation/**/results.json"))


def test_a_tokenizer_that_does_not_belong_to_the_decoder(shards: Path, tmp_path: Path) -> None:
    """A decoder folder, first without a tokenizer of its own and with few embeddings, then with another one."""
    words = [f"word{number}" for number in range(60)]
    own, other = train_tokenizer(words[:30], 20), train_tokenizer(words, 60)
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    decoder.save_pretrained(tmp_path / "decoder")
    other.save_pretrained(tmp_path / "other")
    named = ["--model.decoder.text_decoder", tmp_path / "decoder", "--data.tokenizer_type", tmp_path / "other"]
    (done,) = forked("train.py", *training(shards / "train", tmp_path / "run", *named))
    line = only_line(done)
    assert "has ids up to 59" in line
    assert quoted("do not belong together") in line
    assert f"decoder '{tmp_path / 'decoder'}' has embeddings for 20" in line
    assert str(tmp_path / "other") in line

    own.save_pretrained(tmp_path / "decoder")
    (done,) = forked("train.py", *training(shards / "train", tmp_path / "second", *named))
    line = only_line(done)
    assert f"data.tokenizer_type '{tmp_path / 'other'}' {quoted('gives other ids than')}" in line


def test_a_checkpoint_of_another_model_shape(straight: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    wider = ["--model.decoder.intermediate_size", 32]
    for arguments in (
        training(shards / "train", run, *wider),  # going on with the run
        training(shards / "train", tmp_path / "new", *wider, "--checkpoint_path", run / "checkpoints/step-000006"),
    ):
        (done,) = forked("train.py", *arguments)
        line = only_line(done)
        assert str(run / "checkpoints" / "step-000006" / "model.safetensors.index.json") in line
        assert quoted("is of another model shape") + ": decoder.model.layers.0.mlp" in line
    verify_checkpoint(run / "checkpoints" / "step-000006")
    assert (run / "config.yaml").read_text() == (straight / "config.yaml").read_text()


def test_damaged_steps_are_no_start(straight: Path, shards: Path, tmp_path: Path) -> None:
    """Cases 22 and 24: neither a run over a folder of them, nor one that names such a step, begins."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in (run / "checkpoints").iterdir():
        file = step / "model-00001-of-00002.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (done,) = forked("train.py", *training(shards / "train", run))
    line = only_line(done)
    assert f"{run / 'checkpoints'} {quoted('has no step that is whole')}: " in line
    assert all(f"step-00000{step}/model-00001-of-00002.safetensors is damaged" in line for step in (3, 6))
    named = run / "checkpoints" / "step-000006"
    for mode in ("train", "evaluate_checkpoint"):
        (done,) = forked(
            "train.py", *training(shards / "train", tmp_path / "new", "--checkpoint_path", named, "--mode", mode)
        )
        assert f"{named}/model-00001-of-00002.safetensors is damaged: its SHA-256 is not what was" in only_line(done)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_step_that_is_not_there_is_told_with_those_that_are(straight: Path, shards: Path, tmp_path: Path) -> None:
    steps = straight / "checkpoints"
    for named in (steps / "step-000009", steps, straight):
        (done,) = forked("train.py", *training(shards / "train", tmp_path, "--checkpoint_path", named))
        line = only_line(done)
        assert str(named) in line
        assert f"{steps} has step-000003, step-000006" in line


@pytest.mark.parametrize("content", ['{"filepath1": "a.wav"}', "[1, 2", "[]", '"text"', "[[1]]", "\ufffe"])
def test_json_that_is_not_a_list_of_records(content: str, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    (done,) = forked("mellow-shards", "build", "--json", file, "--audio-root", tmp_path, "--out", tmp_path / "out")
    assert only_line(done).startswith(f"error: {file}")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_audio_root_that_is_not_there(shards: Path, tmp_path: Path) -> None:
    records, nowhere = shards / "corpus" / "train.json", tmp_path / "nowhere"
    (done,) = forked("mellow-shards", "build", "--json", records, "--audio-root", nowhere, "--out", tmp_path / "out")
    assert f"audio root {nowhere} is not a folder" in only_line(done)
    assert not (tmp_path / "out" / "manifest.json").exists()
