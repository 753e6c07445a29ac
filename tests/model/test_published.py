"""Files of published encoders: names into ours, strictly, and nothing in a file executed."""

import os
import re

import pytest
import torch

from mellow_ds.errors import CheckpointError
from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import Cnn14Encoder, HtsatEncoder
from mellow_ds.model.published import load_pretrained_encoder, read_checkpoint

SMALL = {"patch_embeds_hidden_size": 8, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}
CNN14_CONSTANTS = ("spectrogram_extractor.stft.conv_real.weight", "logmel_extractor.melW")


@pytest.fixture
def cnn14() -> Cnn14Encoder:
    return Cnn14Encoder(MellowEncoderConfig(kind="Cnn14", channels=(4, 8), out_emb=8, num_classes=3, mel_bins=16))


@pytest.fixture
def htsat() -> HtsatEncoder:
    return HtsatEncoder(MellowEncoderConfig(num_classes=5, out_emb=64, trunk=SMALL))


def shuffled(module) -> dict:
    """Its weights, each drawn anew."""
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def publish_htsat(state: dict) -> dict:
    """Our names -> those of HTSAT's own code, the three parts of attention stacked."""
    published = {}
    for name, value in state.items():
        name = name.removeprefix("net.").removeprefix("trunk.")
        name = name.replace("batch_norm.", "bn0.").replace("layernorm_before", "norm1")
        name = name.replace("layernorm_after", "norm2").replace("attention.output.dense", "attn.proj")
        name = name.replace("attention.self.", "attn.").replace("intermediate.dense", "mlp.fc1")
        name = re.sub(r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2", name)
        if ".attn.key." in name or ".attn.value." in name:
            continue
        if ".attn.query." in name:
            ours = next(key for key, other in state.items() if other is value)
            parts = [state[ours.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            name, value = name.replace("query", "qkv"), torch.cat(parts)
        published[name] = value
    return published


def test_a_panns_file_loads(cnn14, tmp_path):
    state = shuffled(cnn14)
    published = {name.removeprefix("net."): value for name, value in state.items()}
    published.update({name: torch.zeros(2) for name in CNN14_CONSTANTS})
    torch.save({"iteration": 600_000, "model": published}, tmp_path / "Cnn14_mAP=0.431.pth")
    for path in (tmp_path / "Cnn14_mAP=0.431.pth", tmp_path, str(tmp_path)):
        fresh = Cnn14Encoder(MellowEncoderConfig(kind="Cnn14", channels=(4, 8), out_emb=8, num_classes=3, mel_bins=16))
        load_pretrained_encoder(fresh, path)
        assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())


def test_an_audioset_htsat_file_loads(htsat, tmp_path):
    state = shuffled(htsat)
    published = {f"sed_model.{name}": value for name, value in publish_htsat(state).items()}
    assert "sed_model.layers.2.blocks.1.attn.qkv.weight" in published
    assert "sed_model.layers.0.blocks.0.mlp.fc2.bias" in published
    published["sed_model.head.weight"] = torch.zeros(5, 5)
    published["sed_model.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    published["sed_model.spectrogram_extractor.stft.conv_real.weight"] = torch.zeros(1)
    torch.save({"state_dict": published, "epoch": 3}, tmp_path / "HTSAT_AudioSet_Saved_1.ckpt")
    load_pretrained_encoder(htsat, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in htsat.state_dict().items())


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])  # 20KB: split over several files with an index
def test_the_encoder_of_a_model_folder_loads(
    model, tmp_path, waveforms, model_config, data_config, tokenizer, shard_size
):
    from mellow_ds.model.assemble import build_model

    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").is_file() == (shard_size == "1GB")
    other = build_model(model_config, data_config, tokenizer, seed=99).eval()
    assert not torch.equal(other.encode(waveforms).embeddings, model.encode(waveforms).embeddings)
    load_pretrained_encoder(other.encoder, tmp_path)
    assert torch.equal(other.encode(waveforms).embeddings, model.encode(waveforms).embeddings)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("fc1.bias"), r"1 missing \(net.fc1.bias\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unknown \(net.extra\)"),
        (lambda state: state.update({"fc1.bias": torch.zeros(9)}), r"fc1.bias has shape \[9\].*\[8\]"),
    ],
)
def test_other_names_or_shapes_are_refused(cnn14, tmp_path, change, named):
    published = {name.removeprefix("net."): value for name, value in cnn14.state_dict().items()}
    change(published)
    before = {name: value.clone() for name, value in cnn14.state_dict().items()}
    torch.save({"model": published}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=named):
        load_pretrained_encoder(cnn14, tmp_path / "file.pth")
    assert all(torch.equal(value, before[name]) for name, value in cnn14.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt.*run code"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {"a": torch.zeros(10_000)}}, tmp_path / "cut.ckpt")
    whole = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("text.ckpt", "cut.ckpt", "list.ckpt", "absent.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="3 checkpoint files"):
        load_pretrained_encoder(torch.nn.Linear(1, 1), tmp_path)


def test_the_prefix_of_data_parallel_training_is_taken_off(tmp_path):
    torch.save({"module.a": torch.ones(1)}, tmp_path / "file.pt")
    assert list(read_checkpoint(tmp_path / "file.pt")) == ["a"]
