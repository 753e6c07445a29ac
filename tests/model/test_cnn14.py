"""Cnn14 against its formula written out with torch's functions, and its count of frames."""

import pytest
import torch
from torch.nn import functional as F

from mellow_ds.model.cnn14 import Cnn14
from mellow_ds.model.configuration import MellowEncoderConfig


def norm(x, state, name):
    shape = (1, -1, 1, 1)
    scaled = (x - state[f"{name}.running_mean"].view(shape)) / (state[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def cnn14_by_hand(log_mel, state, blocks):
    x = norm(log_mel.permute(0, 3, 2, 1), state, "bn0").permute(0, 3, 2, 1)
    for block in range(1, blocks + 1):
        for layer in (1, 2):
            x = F.conv2d(x, state[f"conv_block{block}.conv{layer}.weight"], padding=1)
            x = norm(x, state, f"conv_block{block}.bn{layer}").clamp(min=0)
        if block < blocks:
            height, width = x.shape[2] // 2, x.shape[3] // 2
            x = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2).mean(dim=(3, 5))
    frames = x.mean(dim=3)
    pooled = frames.max(dim=2).values + frames.mean(dim=2)
    hidden = (pooled @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)
    return torch.sigmoid(hidden @ state["fc_audioset.weight"].T + state["fc_audioset.bias"]), frames.permute(0, 2, 1)


@pytest.mark.parametrize("channels", [(4, 6, 8), (3,), (2, 2, 3, 3, 4, 5)])
def test_the_network_computes_its_formula(channels):
    net = Cnn14(MellowEncoderConfig(kind="Cnn14", channels=channels, mel_bins=32, num_classes=7)).eval()
    state = {name: torch.rand_like(value.float()) + 0.1 for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    log_mel = torch.randn(2, 1, 41, 32)
    with torch.no_grad():
        posteriors, frames = net(log_mel)
    expected_posteriors, expected_frames = cnn14_by_hand(log_mel, state, len(channels))
    torch.testing.assert_close(posteriors, expected_posteriors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frames, expected_frames, rtol=1e-4, atol=1e-4)
    assert frames.shape[1] == Cnn14.num_frames(41, len(channels))


def test_the_published_sizes_give_31_frames_for_10_seconds():
    assert Cnn14.num_frames(1001, 6) == 31


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_only_while_training(dropout):
    net = Cnn14(MellowEncoderConfig(kind="Cnn14", channels=(4, 4), mel_bins=16, num_classes=3, dropout=dropout))
    log_mel = torch.randn(2, 1, 20, 16)
    net.train()
    assert torch.equal(net(log_mel)[1], net(log_mel)[1]) == (dropout == 0)
    net.eval()
    assert torch.equal(net(log_mel)[1], net(log_mel)[1])
