"""The projector against its formula, and Mellow's 129 tokens against the procedure that the original runs."""

import pytest
import torch

from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import AudioFeatures
from mellow_ds.model.projector import MellowProjector


def project(projector, x):
    """e = W1 x; normalise(e + W2 gelu(e))."""
    e = x @ projector.linear1.weight.T
    gelu = e * 0.5 * (1 + torch.erf(e / 2**0.5))
    y = e + gelu @ projector.linear2.weight.T
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return y * projector.layer_norm.weight + projector.layer_norm.bias


def embed_classes(projector, posteriors):
    return posteriors @ projector.c2l.weight.T + projector.c2l.bias


@pytest.fixture
def features() -> AudioFeatures:
    return AudioFeatures(embeddings=torch.randn(2, 1, 12), posteriors=torch.rand(2, 32, 5))


@torch.no_grad()
def test_htsat_gives_the_latent_then_its_frames(features):
    projector = MellowProjector(MellowEncoderConfig(num_classes=5, out_emb=12), 6, 0.5).eval()
    torch.nn.init.uniform_(projector.layer_norm.weight)
    tokens = projector(features)
    expected = project(
        projector, torch.cat([features.embeddings, embed_classes(projector, features.posteriors)], dim=1)
    )
    assert tokens.shape == (2, 33, 6)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_129_tokens_are_what_1025_projected_and_averaged_in_runs_of_8_give(features):
    projector = MellowProjector(MellowEncoderConfig(num_classes=5, out_emb=12, audio_tokens=129), 6, 0.5).eval()
    frames = embed_classes(projector, features.posteriors.repeat_interleave(32, dim=1))  # 1,024 frames
    long = project(projector, torch.cat([features.embeddings, frames], dim=1))
    expected = torch.cat([long[:, :1], long[:, 1:].reshape(2, 128, 8, 6).mean(dim=2)], dim=1)
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cnn14_gives_the_clip_then_its_frames():
    projector = MellowProjector(MellowEncoderConfig(kind="Cnn14", num_classes=5, out_emb=8), 6, 0.0).eval()
    features = AudioFeatures(embeddings=torch.randn(3, 4, 8), posteriors=torch.rand(3, 1, 5))
    expected = project(
        projector, torch.cat([embed_classes(projector, features.posteriors), features.embeddings], dim=1)
    )
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropout_is_on_the_second_branch_only():
    projector = MellowProjector(MellowEncoderConfig(kind="waveform", out_emb=8), 6, 0.999999).train()
    features = AudioFeatures(embeddings=torch.randn(1, 4, 8))
    e = features.embeddings @ projector.linear1.weight.T
    expected = (e - e.mean(-1, keepdim=True)) / (e.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-5)
