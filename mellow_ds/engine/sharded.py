"""FSDP2: parameters sharded over all ranks, block by block. The only file that calls `fully_shard`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mellow_ds.engine.frozen import HALF_TYPES, place, whole_parts
from mellow_ds.model.blocks import blocks_of
from mellow_ds.model.meta import ReadWeight, materialise


class ShardedModel:
    """A model under `fully_shard`; stages as ZeRO's, see docs/communication.md.

    Stage 1 keeps parameters gathered from a micro-batch's forward to the step's last backward, and gradients whole
    until then; stage 2 gathers for each micro-batch and reduces gradients in each; stage 3 also frees the parameters of
    a block after its forward, and gathers them once more for its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        precision: str,
        device: torch.device,
        world_size: int,
        offload: bool,
        frozen_whole_megabytes: float,
        read_weight: ReadWeight | None = None,
    ) -> None:
        """`read_weight`: gives the parameters that are on the meta device, a block at a time."""
        self._model = model
        self._stage = stage
        whole = [model.get_submodule(name) for name in whole_parts(model, frozen_whole_megabytes)]
        for part in whole:
            if read_weight is not None:
                materialise(model, part, read_weight)
            place(part, device, precision)
        half = HALF_TYPES.get(precision)
        pinned = device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (world_size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
        }
        ignored = {parameter for part in whole for parameter in part.parameters()}
        blocks = list(_blocks(model, ignored))
        for block in blocks:
            if read_weight is not None:
                materialise(model, block, read_weight)
            fully_shard(block, reshard_after_forward=stage == 3, **options)
        if read_weight is not None:
            materialise(model, model, read_weight)
        # what is left (embeddings, norms) is used at both ends of the forward pass
        self._root = fully_shard(model, reshard_after_forward=False, ignored_params=ignored, **options)
        for before, block in pairwise(blocks):
            if not _is_trained(before) and _is_trained(block) and isinstance(block, FSDPModule):
                # FSDP2 would gather the frozen block ahead of a backward pass that it has not; the root is there anyway
                block.set_modules_to_backward_prefetch([self._root])

    def begin_micro_batch(self, is_last: bool) -> None:
        """See `StepEngine`."""
        reduces = is_last or self._stage > 1
        self._root.set_requires_gradient_sync(reduces)
        self._root.set_reshard_after_backward(reduces)
        self._root.set_is_last_backward(is_last)

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The model's output."""
        return self._model(**inputs)

    forward_again = forward

    def settle(self) -> None:
        """Shard all parameters again, after passes that were not a step's."""
        for module in self._modules():
            module.reshard()

    @contextmanager
    def in_step(self) -> Iterator[nn.Module]:
        """The model, whose forward gathers as in training (a collective call)."""
        try:
            yield self._model
        finally:
            self.settle()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all weights gathered; its forward then needs no other rank (a collective call)."""
        modules = self._modules()
        self._root.set_reshard_after_forward(False)
        for module in modules:
            module.unshard()
        try:
            yield self._model
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(self._stage == 3 and module is not self._root, recurse=False)

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self._model.modules() if isinstance(module, FSDPModule)]


def whole_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All of a sharded tensor (a collective call); others as they are.

    It is gathered on `device`: the ranks of GPUs cannot send what is offloaded from where it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    own = tensor.to_local()
    if own.device.type != device.type:
        tensor = DTensor.from_local(
            own.to(device), tensor.device_mesh, tensor.placements,
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip
    return tensor.full_tensor()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def length_of_parts(tensor: torch.Tensor) -> int:
    """Numbers in each rank's part of a sharded tensor, but for what lacks at the end: its first dimension is cut."""
    assert isinstance(tensor, DTensor)
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    return rows * math.prod(tensor.shape[1:])


def set_from_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy into `target` its part of `whole`, which every rank brings; nothing is sent."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            source = distribute_tensor(
                whole.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(source.to_local())
        else:
            target.copy_(whole)


def _blocks(model: nn.Module, ignored: set[nn.Parameter]) -> Iterator[nn.Module]:
    """What is gathered at a time: decoder blocks, stages of an encoder, and the projector."""
    for name, part in model.named_children():
        for block in [part] if name == "projector" else blocks_of(part):
            if any(parameter not in ignored for parameter in block.parameters()):
                yield block


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())
