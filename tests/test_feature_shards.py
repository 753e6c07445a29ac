"""Feature shards against the encoder run directly, and a model trained on them against one that hears the audio."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mellow_ds.data.examples import BatchBuilder
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.webdataset import as_webdataset
from mellow_ds.errors import ConfigError, PackingError, ShardError
from mellow_ds.feature_shards import FeatureSettings, build_feature_shards
from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig
from mellow_ds.model.encoders import build_encoder
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.packing.verify import verify_shards
from mellow_ds.shard_format import read_manifest
from tests.data.made_shards import RATE, CharTokenizer, make_layout, simple_clips, write_shards

WINDOW = 1600
TEXT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 200, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def config() -> MellowEncoderConfig:
    return MellowEncoderConfig(
        kind="Cnn14", sampling_rate=RATE, clip_samples=WINDOW, window_size=256, hop_size=160, mel_bins=16, fmax=4000.0,
        channels=(4, 8), out_emb=8, num_classes=5,
    )  # fmt: skip


@pytest.fixture
def encoder(config: MellowEncoderConfig) -> torch.nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    return build_encoder(config).eval()


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Two shards; clips of 3000 to 3040 samples, which a window of 1600 crops, and short ones."""
    return write_shards(tmp_path / "audio", [simple_clips(0, 5, 2, 3000), simple_clips(1, 4, 3, 500)])


def build(audio: Path, out: Path, encoder: torch.nn.Module, config: MellowEncoderConfig, **settings: object):
    return build_feature_shards(str(audio), out, encoder, config, "Cnn14 of a test", FeatureSettings(**settings))


def test_features_are_what_the_encoder_gives(audio: Path, tmp_path: Path, encoder, config) -> None:
    manifest = build(audio, tmp_path / "features", encoder, config, crops=3, batch_size=4)
    assert manifest == read_manifest(tmp_path / "features")
    info = manifest.features
    assert info is not None
    reader, source = (ShardReader([folder], RATE) for folder in (tmp_path / "features", audio))
    assert info.crop_bytes == 2 * (np.prod(info.embeddings) + 5)
    for shard, num_crops in ((0, 3), (1, 1)):
        for row in range(source.num_samples(shard)):
            sample, heard = reader.sample(shard, row), source.sample(shard, row)
            assert sample.info == heard.info
            assert len(sample.audio) == num_crops * info.crop_bytes
            samples = np.frombuffer(heard.audio[44:], dtype="<i2") / np.float32(32768)
            for crop in range(num_crops):
                start = (len(samples) - WINDOW) * crop // 2 if num_crops > 1 else 0
                window = np.zeros(WINDOW, dtype=np.float32)
                window[: len(samples[start : start + WINDOW])] = samples[start : start + WINDOW]
                with torch.no_grad():
                    wanted = encoder(torch.from_numpy(window)[None])
                flat = torch.cat([wanted["embeddings"].flatten(), wanted["posteriors"].flatten()])
                found = np.frombuffer(sample.audio, dtype="<f2").reshape(num_crops, -1)[crop]
                np.testing.assert_allclose(found, flat.numpy(), rtol=2e-3, atol=1e-4)
    assert verify_shards(tmp_path / "features") == []


def test_plain_webdataset_reads_them(audio: Path, tmp_path: Path, encoder, config) -> None:
    import webdataset

    manifest = build(audio, tmp_path / "features", encoder, config)
    found = 0
    for sample in webdataset.WebDataset(str(tmp_path / "features" / manifest.shards[0].name), shardshuffle=False):
        assert len(sample["f16"]) == manifest.features.crop_bytes
        assert json.loads(sample["json"])["key"] == sample["__key__"]
        found += 1
    assert found == 5
    own = list(as_webdataset(tmp_path / "features"))
    assert [sample["features"].shape for sample in own] == [(1, manifest.features.crop_bytes // 2)] * 9


@pytest.mark.slow
def test_processes_give_the_same_bytes_and_a_stopped_build_goes_on(
    audio: Path, tmp_path: Path, encoder, config
) -> None:
    one = build(audio, tmp_path / "one", encoder, config, crops=2)
    several = build(audio, tmp_path / "several", encoder, config, crops=2, workers=2)
    assert one == several
    # a build that was killed after its first shard: its work folder has that shard and its note
    import mellow_ds.feature_shards as room

    done: list[int] = []

    def stops_after_one(task, count):
        if done:
            raise KeyboardInterrupt
        done.append(task.number)
        return original(task, count)

    original, room.encode_shard = room.encode_shard, stops_after_one
    try:
        with pytest.raises(KeyboardInterrupt):
            build(audio, tmp_path / "stopped", encoder, config, crops=2)
        done.clear()
        assert build(audio, tmp_path / "stopped", encoder, config, crops=2) == one
    finally:
        room.encode_shard = original
    assert done == [1]  # the first shard was not made again
    assert not (tmp_path / "stopped" / ".build").exists()


def test_a_finished_build_is_left_and_another_is_refused(audio: Path, tmp_path: Path, encoder, config) -> None:
    out = tmp_path / "features"
    first = build(audio, out, encoder, config)
    before = (out / first.shards[0].name).stat().st_mtime_ns
    assert build(audio, out, encoder, config) == first
    assert (out / first.shards[0].name).stat().st_mtime_ns == before
    with pytest.raises(PackingError, match="finished build of something else"):
        build(audio, out, encoder, config, crops=2)
    with pytest.raises(ShardError, match="holds features already"):
        build(out, tmp_path / "twice", encoder, config)
    with pytest.raises(ConfigError, match="features of Cnn14 of a test"):
        ShardReader([audio, out], RATE)


def test_a_damaged_source_is_named_and_nothing_is_published(audio: Path, tmp_path: Path, encoder, config) -> None:
    path = audio / "shard-000001.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset_data + 60
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-000001\.tar, sample \w+ at offset \d+: its checksum"):
        build(audio, tmp_path / "features", encoder, config)
    assert not (tmp_path / "features" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["Cnn14", "HTSAT"])
def test_the_loss_from_features_is_the_loss_from_audio(audio: Path, tmp_path: Path, kind: str, config) -> None:
    """A whole model in eval mode on the same examples, crops from the start; gradients of the projector too."""
    torch.manual_seed(2)
    if kind == "HTSAT":
        trunk = {"patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        config = replace_config(config, kind="HTSAT", mel_bins=64, out_emb=64, trunk=trunk)
    model = MellowForConditionalGeneration(MellowConfig(encoder_config=config, text_config=TEXT, projector_dropout=0.0))
    model.set_trainable(("projector", "decoder"))
    model.eval()
    build(audio, tmp_path / "features", model.encoder, model.config.encoder_config)
    layout = make_layout(audio_tokens=model.num_audio_tokens)
    places = np.array([(0, n, 0) for n in range(8)] + [(1, n, 0) for n in range(4)])
    losses, gradients = [], []
    for folder in (audio, tmp_path / "features"):
        reader = ShardReader([folder], RATE)
        batch = BatchBuilder(reader, CharTokenizer(), layout, WINDOW, seed=None).build(places).batch
        assert (batch.waveforms is None) == (reader.features is not None)
        output = model(**batch.model_inputs())
        model.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(model.projector.linear1.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert float(gradients[0].abs().max()) > 1e-3  # the loss depends on the clips
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-4)


def replace_config(config: MellowEncoderConfig, **changes: object) -> MellowEncoderConfig:
    return MellowEncoderConfig(**{**config.to_dict(), **changes})


def test_training_draws_crops_by_epoch_and_evaluation_takes_the_first(
    audio: Path, tmp_path: Path, encoder, config
) -> None:
    build(audio, tmp_path / "features", encoder, config, crops=3)
    reader = ShardReader([tmp_path / "features"], RATE)
    crops = np.frombuffer(reader.sample(0, 0).audio, dtype="<f2").reshape(3, -1)
    layout = make_layout()

    def embeddings(seed: int | None, epoch: int) -> np.ndarray:
        batch = BatchBuilder(reader, CharTokenizer(), layout, WINDOW, seed).build(np.array([(0, 1, epoch)])).batch
        return batch.embeddings[0].numpy().reshape(-1)

    size = embeddings(None, 0).size
    np.testing.assert_array_equal(embeddings(None, 5), crops[0, :size])
    drawn = {next(k for k in range(3) if (embeddings(1, epoch) == crops[k, :size]).all()) for epoch in range(30)}
    assert drawn == {0, 1, 2}


def test_batches_without_examples_have_features_too(audio: Path, tmp_path: Path, encoder, config) -> None:
    info = build(audio, tmp_path / "features", encoder, config).features
    reader = ShardReader([tmp_path / "features"], RATE)
    batch = (
        BatchBuilder(reader, CharTokenizer(), make_layout(), WINDOW, 1).build(np.empty((0, 3), dtype=np.int64)).batch
    )
    assert batch.num_examples == 0
    assert batch.embeddings.shape == (1, *info.embeddings)
    assert replace(batch, waveforms=None) == batch or batch.waveforms is None
