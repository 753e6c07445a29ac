"""DistributedDataParallel: the whole model on every rank, gradients averaged in the last micro-batch of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mellow_ds.engine.frozen import HALF_TYPES


class ReplicatedModel:
    """A model under DDP; half precision by autocast over float32 weights."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self._model = model.to(device)
        self._device = device
        self._half = HALF_TYPES.get(precision)
        # ranks start equal (one seed, or one file), and BatchNorm statistics are averaged by the engine
        self._wrapped = DistributedDataParallel(
            self._model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def begin_micro_batch(self, is_last: bool) -> None:
        """See `StepEngine`."""
        self._wrapped.require_backward_grad_sync = is_last

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The model's output."""
        return self._run(self._wrapped, inputs)

    def forward_again(self, inputs: dict[str, Any]) -> Any:
        """The model's output, past DDP, which would wait for gradients."""
        return self._run(self._model, inputs)

    def settle(self) -> None:
        """See `ShardedModel`."""

    def _run(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        with torch.autocast(self._device.type, self._half, enabled=self._half is not None):
            return module(**inputs)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model."""
        yield self._model

    in_step = whole
