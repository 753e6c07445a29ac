"""HTSAT: the head restated, the counts that the layout rests on, and the time it takes to build it in full size."""

import time

import pytest
import torch

from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import HtsatEncoder, count_audio_tokens

SMALL = {"patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}


@pytest.fixture
def encoder() -> HtsatEncoder:
    return HtsatEncoder(MellowEncoderConfig(num_classes=11, out_emb=64, trunk=SMALL)).eval()


@pytest.mark.parametrize("seconds", [10.0, 3.7])
def test_a_clip_of_any_length_is_a_latent_and_32_frames(encoder, seconds):
    waveforms = torch.randn(2, round(32_000 * seconds)) * 0.1
    with torch.no_grad():
        features = encoder(waveforms)
    assert features.embeddings.shape == (2, 1, 64)
    assert features.posteriors.shape == (2, 32, 11)
    assert count_audio_tokens(MellowEncoderConfig()) == 33
    assert count_audio_tokens(MellowEncoderConfig(audio_tokens=129)) == 129


def test_the_head_is_a_3_frame_convolution_over_both_frequency_halves(encoder):
    waveforms = torch.randn(1, 320_000) * 0.1
    with torch.no_grad():
        features = encoder(waveforms)
        state = encoder.net.trunk(encoder.log_mel(waveforms)).last_hidden_state[0]  # [D, 2, 32]
        weight, bias = encoder.net.tscam_conv.weight, encoder.net.tscam_conv.bias
        padded = torch.nn.functional.pad(state, (1, 1))
        logits = torch.stack([torch.einsum("dfw,kdfw->k", padded[:, :, i : i + 3], weight) + bias for i in range(32)])
        clip = encoder.clip_posteriors(waveforms)[0]
    torch.testing.assert_close(features.posteriors[0], torch.sigmoid(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip, torch.sigmoid(logits.mean(dim=0)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.embeddings[0, 0], state.mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)


def test_the_full_size_is_built_in_seconds():
    started = time.process_time()
    encoder = HtsatEncoder(MellowEncoderConfig())
    assert time.process_time() - started < 10
    assert 27e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 32e6
