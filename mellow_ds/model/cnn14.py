"""Cnn14, the convolutional tagger of PANNs (Kong et al. 2020, arXiv:1912.10211), in any number and width of blocks.

Parameter names are those of the published checkpoints (conv_block1.conv1.weight, fc_audioset.bias, ...).
"""

import torch
from torch import nn
from torch.nn import functional

from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.norm import BatchNorm2d


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, then average pooling over `pool` x `pool`."""

    def __init__(self, in_channels: int, out_channels: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(out_channels)
        self.bn2 = BatchNorm2d(out_channels)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[C, in, frames, mel] -> [C, out, frames / pool, mel / pool]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.avg_pool2d(x, self.pool) if self.pool > 1 else x


class Cnn14(nn.Module):
    """Log-mel spectrogram to the posteriors of the clip and one embedding a frame."""

    def __init__(self, config: MellowEncoderConfig) -> None:
        super().__init__()
        channels = config.channels
        self.bn0 = BatchNorm2d(config.mel_bins)
        for number, (before, after) in enumerate(zip([1, *channels[:-1]], channels, strict=True), start=1):
            # the last block keeps its resolution, as in the published network
            self.add_module(f"conv_block{number}", ConvBlock(before, after, pool=1 if number == len(channels) else 2))
        self.num_blocks = len(channels)
        self.fc1 = nn.Linear(channels[-1], channels[-1])
        self.fc_audioset = nn.Linear(channels[-1], config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, log_mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, 1, frames, mel] -> (posteriors of the clip [C, classes], frame embeddings [C, frames', channels[-1]])."""
        x = self.bn0(log_mel.transpose(1, 3)).transpose(1, 3)
        for number in range(1, self.num_blocks + 1):
            x = self.dropout(self.get_submodule(f"conv_block{number}")(x))
        frames = x.mean(dim=3)  # [C, D, frames']
        pooled = frames.amax(dim=2) + frames.mean(dim=2)
        embedding = functional.relu(self.fc1(self.dropout(pooled)))
        posteriors = torch.sigmoid(self.fc_audioset(self.dropout(embedding)))
        return posteriors, frames.transpose(1, 2)

    @staticmethod
    def num_frames(log_mel_frames: int, num_blocks: int) -> int:
        """Frames of the last feature map: every block but the last halves, rounding down."""
        return log_mel_frames >> (num_blocks - 1)
