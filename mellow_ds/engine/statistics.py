"""BatchNorm statistics of a trained encoder: the same on all ranks after a step, and as before after a skipped one."""

import torch
import torch.distributed as dist
from torch import nn


class BatchNormStatistics:
    """The running means and variances of a model's BatchNorm layers that are being trained."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._before: list[torch.Tensor] = []

    def remember(self) -> None:
        """Keep what stands now, for `put_back`."""
        self._before = [tensor.clone() for tensor in self._tensors()]

    def put_back(self) -> None:
        """Undo what a step did that is skipped: one NaN would stay in a running mean for ever."""
        for tensor, before in zip(self._tensors(), self._before, strict=True):
            tensor.copy_(before)

    def average_over_ranks(self) -> None:
        """Give all ranks the mean of their statistics (a collective call).

        Each rank sees its own micro-batches. Training does not read the statistics, evaluation and checkpoints do;
        equal on all ranks at every step, they do not depend on when a run was saved or resumed.
        """
        statistics = [
            tensor
            for norm in self._norms
            if norm.training and getattr(norm, "group", None) is None  # ranks of a group have the same ones already
            for tensor in norm.buffers(recurse=False)
            if tensor.is_floating_point()
        ]
        if not statistics or dist.get_world_size() == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in statistics])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(statistics, flat.split([t.numel() for t in statistics]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def _tensors(self) -> list[torch.Tensor]:
        """Frozen layers are in eval mode and do not move."""
        return [buffer for norm in self._norms if norm.training for buffer in norm.buffers(recurse=False)]
