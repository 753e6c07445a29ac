"""Batch normalisation whose statistics and arithmetic stay float32 when a model is cast to half precision.

bfloat16 has 8 bits: running statistics of a log-mel spectrogram (variances of some hundred) would be rounded, and moved
averages would stop moving. Names and shapes are those of `nn.BatchNorm2d`.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that computes in float32 and gives back the type of its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[C, features, frames, mel] of any floating type -> the same."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        normalised = functional.batch_norm(
            input.float(),
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum,
            self.eps,
        )
        return normalised.to(input.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BatchNorm2d":
        """Casts and moves parameters; the statistics move, but keep their type."""
        kept = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
