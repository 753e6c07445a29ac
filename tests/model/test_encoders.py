"""Encoders of transformers, counts of tokens, and sizes that are refused before anything is built."""

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from mellow_ds.errors import ConfigError
from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import (
    WaveformEncoder,
    build_encoder,
    check_encoder,
    count_audio_tokens,
    load_waveform_weights,
)


@pytest.fixture
def wav2vec2_config() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[4, 4],
        conv_kernel=[10, 3],
        conv_stride=[5, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )


def waveform_config(trunk: Wav2Vec2Config, audio_tokens: int) -> MellowEncoderConfig:
    return MellowEncoderConfig(
        kind="waveform",
        sampling_rate=16_000,
        clip_samples=1600,
        out_emb=16,
        audio_tokens=audio_tokens,
        trunk=trunk.to_dict(),
    )


def test_a_wav2vec2_folder_gives_what_transformers_gives(wav2vec2_config, tmp_path):
    pretrained = Wav2Vec2Model(wav2vec2_config).eval()
    pretrained.save_pretrained(tmp_path)
    config = waveform_config(wav2vec2_config, 0)
    check_encoder(config)
    encoder = build_encoder(config)
    assert isinstance(encoder, WaveformEncoder)
    load_waveform_weights(encoder, str(tmp_path))
    encoder.eval()
    waveforms = torch.randn(2, 1600) * 0.05 + 0.01
    prepared = Wav2Vec2FeatureExtractor()(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = pretrained(prepared["input_values"]).last_hidden_state
        found = encoder(waveforms)
    torch.testing.assert_close(found.embeddings, expected, rtol=1e-3, atol=1e-4)
    assert found.posteriors is None
    assert count_audio_tokens(config) == expected.shape[1]


def test_frames_are_averaged_down_to_the_tokens_asked_for(wav2vec2_config):
    every = build_encoder(waveform_config(wav2vec2_config, 0)).eval()
    some = build_encoder(waveform_config(wav2vec2_config, 8)).eval()
    some.load_state_dict(every.state_dict())
    waveforms = torch.randn(1, 1635)  # 325 convolution frames, then 81
    with torch.no_grad():
        frames, averaged = every(waveforms).embeddings[0], some(waveforms).embeddings[0]
    assert averaged.shape == (8, 16)
    edges = [(i * len(frames) // 8, -(-(i + 1) * len(frames) // 8)) for i in range(8)]
    expected = torch.stack([frames[start:stop].mean(dim=0) for start, stop in edges])
    torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-5)
    assert count_audio_tokens(waveform_config(wav2vec2_config, 8)) == 8


def test_every_weight_takes_part_in_training(wav2vec2_config):
    encoder = build_encoder(waveform_config(wav2vec2_config, 4)).train()
    encoder(torch.randn(1, 1600)).embeddings.square().sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None]


def test_cnn14_has_a_token_for_the_clip_and_one_for_each_frame():
    assert count_audio_tokens(MellowEncoderConfig(kind="Cnn14", out_emb=2048)) == 32
    narrow = MellowEncoderConfig(kind="Cnn14", channels=(4, 8, 8), hop_size=160, clip_samples=3200)
    assert count_audio_tokens(narrow) == 1 + 21 // 4
    assert count_audio_tokens(narrow, 6400) == 1 + 41 // 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "HTSAT", "out_emb": 512}, "out_emb"),
        ({"kind": "HTSAT", "mel_bins": 80}, "mel_bins"),
        ({"kind": "HTSAT", "clip_samples": 640_000}, "segment_seconds"),
        ({"kind": "HTSAT", "sampling_rate": 16_000}, "fmax"),
        ({"kind": "HTSAT", "clip_samples": 500}, "window_size"),
        ({"kind": "Cnn14", "out_emb": 768}, "channels"),
        ({"kind": "Cnn14", "out_emb": 2048, "mel_bins": 16}, "channels"),
        ({"kind": "Cnn14", "out_emb": 2048, "audio_tokens": 40}, "audio_tokens"),
        ({"kind": "waveform", "trunk": {"model_type": "whisper"}}, "whisper"),
        ({"kind": "waveform", "trunk": {"model_type": "wav2vec2", "hidden_size": 768}}, "sampling_rate"),
        (
            {"kind": "waveform", "sampling_rate": 16_000, "trunk": {"model_type": "hubert", "hidden_size": 16}},
            "out_emb",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(fields, named):
    with pytest.raises(ConfigError, match=named):
        check_encoder(MellowEncoderConfig(**fields))
