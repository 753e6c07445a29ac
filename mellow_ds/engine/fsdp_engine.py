"""The PyTorch back end, from the same JSON as DeepSpeed: DDP for stage 0, FSDP2 for stages 1 to 3."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.batch import Batch
from mellow_ds.ds_config import StepShape, offload_device, resolve_engine_json, zero_stage
from mellow_ds.engine.fault import RandomState
from mellow_ds.engine.loss_scale import LossScale
from mellow_ds.engine.optimizer import (
    ADAM_MOMENTS,
    MUON_MOMENTS,
    OptimizerSet,
    gradient_norm,
    moment_names,
    parameter_groups,
    torch_optimizers,
)
from mellow_ds.engine.owner import (
    Keeper,
    copy_for,
    even_places,
    gathered_at,
    kept_at,
    kept_by,
    to_cpu,
    whole_place,
)
from mellow_ds.engine.protocol import ParameterState, SavedParameter
from mellow_ds.engine.replicated import ReplicatedModel
from mellow_ds.engine.sharded import ShardedModel, length_of_parts, own_part, set_from_whole, whole_tensor
from mellow_ds.engine.statistics import BatchNormStatistics
from mellow_ds.engine.step import StepEngine, check_moments, saved_buffers, trained
from mellow_ds.errors import ConfigError
from mellow_ds.model.meta import ReadWeight


class FSDPEngine(StepEngine):
    """`Engine` over `fully_shard` or DistributedDataParallel; the process group must exist."""

    def __init__(
        self,
        model: nn.Module,
        engine_json: dict[str, Any],
        shape: StepShape,
        config: TrainConfig,
        device: torch.device,
        read_weight: ReadWeight | None = None,
    ) -> None:
        """`read_weight`: gives the parameters that are on the meta device, a block at a time (stages 1 to 3)."""
        resolve_engine_json(engine_json, shape)  # refuses what contradicts the run
        self.device = device
        self._stage = zero_stage(engine_json)
        self.gathers_weights = self._stage == 3
        self._precision = shape.precision
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._model = model
        self._clips = config.optimizer_type != "Muon"  # its updates have a size of their own
        self._scale = LossScale(engine_json.get("fp16", {})) if shape.precision == "float16" else None
        offload = _offloads(engine_json, self._stage)
        if offload and not self._clips and device.type == "cuda":
            raise ConfigError(
                "train.optimizer_type Muon multiplies whole matrices, and with offload each rank has a part of them in "
                "CPU memory, which ranks of GPUs cannot exchange: take no offload, or AdamW"
            )
        self._wrapped: ShardedModel | ReplicatedModel
        if self._stage:
            self._wrapped = ShardedModel(
                model, self._stage, shape.precision, device, self._world_size, offload,
                config.frozen_whole_megabytes, read_weight,
            )  # fmt: skip
        else:
            self._wrapped = ReplicatedModel(model, shape.precision, device)
        groups = parameter_groups(model, config)
        self._optimizer, optimizer_name = torch_optimizers(groups, config)
        self._rates = [group["rate"] for group in self._optimizer.param_groups]
        self._group_parameters = [list(group["params"]) for group in self._optimizer.param_groups]
        self._group_updates = [0] * len(groups)
        self._statistics = BatchNormStatistics(model)
        way = f"FSDP2 stage {self._stage}" if self._stage else "DDP"
        self.name = f"{way} ({optimizer_name}, {shape.precision}{', offloaded' if offload else ''})"

    # -- a step --------------------------------------------------------------------------------------------------------

    def _param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _begin_micro_batch(self, is_last: bool) -> None:
        self._wrapped.begin_micro_batch(is_last)

    def _forward(self, inputs: dict[str, Any]) -> Any:
        return self._wrapped.forward(inputs)

    def _forward_again(self, inputs: dict[str, Any]) -> Any:
        return self._wrapped.forward_again(inputs)

    def _describe_fault(self, batches: Sequence[Batch], random_state: RandomState) -> str:
        fault = super()._describe_fault(batches, random_state)
        self._wrapped.settle()
        return fault

    def _backward(self, loss: torch.Tensor) -> None:
        (loss * self._scale.current if self._scale else loss).backward()

    def _clip_and_step(self, max_grad_norm: float) -> float:
        gradients = [own_part(p.grad) for group in self._group_parameters for p in group if p.grad is not None]
        scale = self._scale.current if self._scale else 1.0
        grad_norm = self._global_norm(gradient_norm(gradients)) / scale
        finite = math.isfinite(grad_norm)
        if finite:
            clip = max_grad_norm / (grad_norm + 1e-6) if self._clips and max_grad_norm else 1.0  # torch's own form
            if min(clip, 1.0) != 1.0 or scale != 1.0:
                torch._foreach_mul_(gradients, min(clip, 1.0) / scale)
            self._optimizer.step()
        if self._scale:
            self._scale.update(overflowed=not finite)
        self._optimizer.zero_grad()
        return grad_norm

    def _global_norm(self, own_norm: float) -> float:
        """Of the gradients of all ranks, of which this one holds a part (all, where nothing is sharded)."""
        if not self._stage:
            return own_norm
        square = torch.tensor(own_norm, dtype=torch.float64, device=self.device) ** 2
        dist.all_reduce(square)
        return math.sqrt(float(square))

    # -- states --------------------------------------------------------------------------------------------------------

    def model_in_step(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.model_in_step`."""
        return self._wrapped.in_step()

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.whole_model`."""
        return self._wrapped.whole()

    def parameter_states(self) -> Iterator[ParameterState]:
        """See `Engine.parameter_states`."""
        updates = self._updates_by_parameter()
        for name, parameter in trained(self._model):
            weight, moments = (to_cpu(whole_tensor(parameter, self.device)), self._moments_of(parameter))
            whole = {key: to_cpu(whole_tensor(moment, self.device)) for key, moment in moments.items()}
            yield ParameterState(name, weight, whole, updates[id(parameter)])

    def saved_parameters(self, keeper: Keeper) -> Iterator[SavedParameter]:
        """See `Engine.saved_parameters`."""
        updates = self._updates_by_parameter()
        for name, parameter in trained(self._model):
            owner = keeper.owner(name)
            if isinstance(parameter, DTensor):
                length = length_of_parts(parameter)
                weight = gathered_at(owner, keeper, own_part(parameter), length, parameter.shape, self.device)
                places = even_places(length, parameter.numel(), self._world_size)
            else:
                weight = kept_at(owner, self._rank, keeper, parameter)
                places = whole_place(owner, parameter.numel(), self._world_size)
            moments = {
                key: copy_for(keeper, own_part(moment).flatten()[: places[self._rank][1]])
                for key, moment in self._moments_of(parameter).items()
            }
            yield SavedParameter(name, weight, moments, places, updates[id(parameter)])

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self._optimizer.state_of(parameter)
        return {key: state[key] for key in (*ADAM_MOMENTS, *MUON_MOMENTS) if key in state}

    def load_parameter_states(self, states: Iterator[ParameterState]) -> None:
        """See `Engine.load_parameter_states`."""
        parameters = dict(trained(self._model))
        groups = {id(p): group for group in self._param_groups() for p in group["params"]}
        counts: dict[int, int] = {}
        for state in states:
            parameter = parameters.get(state.name)
            if parameter is None:
                continue
            check_moments(state, moment_names(groups[id(parameter)]))
            counts[id(parameter)] = state.num_updates
            set_from_whole(parameter.data, state.weight)
            if not state.num_updates:
                continue
            kept = self._optimizer.state_of(parameter)
            for key in moment_names(groups[id(parameter)]):
                kept[key] = torch.zeros_like(parameter.data)
                set_from_whole(kept[key], state.moments[key])
            if not groups[id(parameter)]["use_muon"]:
                kept["step"] = torch.tensor(float(state.num_updates), device=parameter.device)
        self._count_updates(counts)

    def fixed_states(self, keeper: Keeper | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.fixed_states`."""
        for name, buffer in saved_buffers(self._model):
            yield name, kept_by(keeper, name, self._rank)(buffer)
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                yield name, kept_by(keeper, name, self._rank)(whole_tensor(parameter, self.device))

    def scaler_state(self) -> dict[str, float]:
        """See `Engine.scaler_state`."""
        return self._scale.state() if self._scale else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """See `Engine.load_scaler_state`."""
        if self._scale:
            self._scale.load_state(state)

    def close(self) -> None:
        """See `Engine.close`."""
        self._optimizer = OptimizerSet([])


def _offloads(engine_json: dict[str, Any], stage: int) -> bool:
    devices = {offload_device(engine_json, what) for what in ("offload_optimizer", "offload_param")}
    if "nvme" in devices:
        raise ConfigError("the engine JSON offloads to nvme, which only DeepSpeed does: take cpu, or engine deepspeed")
    if "cpu" in devices and not stage:
        raise ConfigError("the engine JSON offloads at stage 0, where nothing is sharded: take stage 1, 2 or 3")
    return "cpu" in devices
