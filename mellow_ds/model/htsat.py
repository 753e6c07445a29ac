"""HTSAT (Chen et al. 2022, arXiv:2202.00874): a Swin transformer over the spectrogram and its token-semantic head.

The trunk is transformers' `ClapAudioEncoder`, which is the same network; the head is here.
"""

import torch
from torch import nn
from transformers import ClapAudioConfig
from transformers.models.clap.modeling_clap import ClapAudioEncoder

from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.norm import BatchNorm2d

# the trunk folds 1,024 frames of 64 bands into a 256 x 256 image; fewer frames are stretched to that
_MEL_BINS = 64
_MAX_FRAMES = 1024


def trunk_config(config: MellowEncoderConfig) -> ClapAudioConfig:
    """The Swin trunk: AudioSet's sizes unless `config.trunk` says otherwise; stochastic depth 0.1 as published."""
    fields = {
        "spec_size": 256,
        "patch_stride": [4, 4],
        "num_mel_bins": _MEL_BINS,
        "window_size": 8,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.1,
        **config.trunk,
    }
    return ClapAudioConfig(**fields)


class Htsat(nn.Module):
    """Log-mel spectrogram to a latent of the clip and class logits of 32 frames."""

    mel_bins = _MEL_BINS
    max_frames = _MAX_FRAMES

    def __init__(self, config: MellowEncoderConfig) -> None:
        super().__init__()
        trunk = trunk_config(config)
        self.trunk = ClapAudioEncoder(trunk)
        self.trunk.batch_norm = BatchNorm2d(_MEL_BINS)  # the same layer, kept in float32
        height = self.trunk.input_resolutions[-1][0] // self.trunk.freq_ratio
        self.tscam_conv = nn.Conv2d(self.trunk.num_features, config.num_classes, (height, 3), padding=(0, 1))

    def forward(self, log_mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, 1, frames, mel] -> (latent [C, D], class logits [C, 32, classes])."""
        output = self.trunk(log_mel)
        logits = self.tscam_conv(output.last_hidden_state)  # [C, classes, 1, 32]
        return output.pooler_output, logits.flatten(2).transpose(1, 2)
