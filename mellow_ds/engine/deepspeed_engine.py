"""The DeepSpeed back end: ZeRO 0 to 3 and offload as the engine JSON says. The only file that imports deepspeed."""

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.ds_config import StepShape, offloads_optimizer, resolve_engine_json, zero_stage
from mellow_ds.engine.fragments import Fragments, own_fragment
from mellow_ds.engine.frozen import HALF_TYPES, hidden, place, whole_parts
from mellow_ds.engine.ops import check_nvme, is_compiled, ops_needed
from mellow_ds.engine.optimizer import ADAM_MOMENTS, gradient_norm, parameter_groups, torch_optimizer
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
from mellow_ds.engine.statistics import BatchNormStatistics
from mellow_ds.engine.step import StepEngine, check_moments, saved_buffers, trained
from mellow_ds.engine.whole_masters import whole_masters
from mellow_ds.errors import ConfigError
from mellow_ds.model.blocks import blocks_of
from mellow_ds.model.meta import ReadWeight, has_meta, materialise

_log = logging.getLogger("mellow_ds.engine")


def avoid_cpu_compilation() -> None:
    """On CPUs, keep DeepSpeed from compiling its shared-memory collectives: two minutes before the first step.

    A private name of DeepSpeed 0.19; a test holds that it still does what it says. Call before the engine is built.
    """
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def avoid_muon_compilation() -> None:
    """Import DeepSpeed's Muon, which it does in the first step whatever the optimizer is, without torch's compiler.

    That is two seconds of each rank's start. Nobody calls it: `train.optimizer_type` Muon is the FSDP engine's.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorator


class DeepSpeedEngine(StepEngine):
    """`Engine` over `deepspeed.initialize`; the process group must exist."""

    def __init__(
        self,
        model: nn.Module,
        engine_json: dict[str, Any],
        shape: StepShape,
        config: TrainConfig,
        device: torch.device,
        read_weight: ReadWeight | None = None,
    ) -> None:
        """`read_weight`: gives the parameters that are on the meta device, a block at a time (stage 3)."""
        _check_precision(shape.precision, zero_stage(engine_json))
        check_nvme(engine_json, ALL_OPS, torch.cuda.is_available())
        avoid_cpu_compilation()
        avoid_muon_compilation()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = device
        self._stage = zero_stage(engine_json)
        self.gathers_weights = self._stage == 3
        self._precision = shape.precision
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._model = model
        resolved = resolve_engine_json(engine_json, shape)
        if self._stage == 0 and shape.precision == "float32":
            resolved["gradient_clipping"] = 0.0  # there we clip ourselves; DeepSpeed fails where a step is skipped
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        # what ZeRO-3 shards it also walks through after each step: whole parts are not shown to it
        self._whole = whole_parts(model, config.frozen_whole_megabytes) if self._stage == 3 else []
        if read_weight is not None and has_meta(model):
            for name in self._whole:
                materialise(model, model.get_submodule(name), read_weight)
            _shard_from_meta(model, resolved, shape.precision, read_weight)
        groups = parameter_groups(model, config)
        self._rates = [group["rate"] for group in groups]
        optimizer, optimizer_name = _build_optimizer(groups, engine_json, config, self._stage)
        # DeepSpeed rewrites the groups' parameter lists; ours say which parameters a flat group holds
        self._group_parameters = [list(group["params"]) for group in optimizer.param_groups]
        self._group_updates = [0] * len(groups)
        if offloads_optimizer(engine_json) and type(optimizer).__name__ != "DeepSpeedCPUAdam":
            resolved["zero_force_ds_cpu_optimizer"] = False
        with hidden(model, self._whole):
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=resolved)
        for name in self._whole:
            place(model.get_submodule(name), device, shape.precision)
        if self._stage == 0 and shape.precision == "bfloat16" and not hasattr(self._engine.optimizer, "bf16_groups"):
            self._undo_first_step()
        scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # train.max_skipped_steps says when to end, and can say why
        self._statistics = BatchNormStatistics(model)
        self.name = f"DeepSpeed ZeRO-{self._stage} ({optimizer_name}, {shape.precision})"

    # -- a step --------------------------------------------------------------------------------------------------------

    def _param_groups(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self._engine.optimizer.param_groups)

    def _begin_micro_batch(self, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)

    def _forward(self, inputs: dict[str, Any]) -> Any:
        return self._engine(**inputs)

    def _forward_again(self, inputs: dict[str, Any]) -> Any:
        return self._model(**inputs)  # past DeepSpeed's wrapper, which wants each backward to be its own

    def _backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def _clip_and_step(self, max_grad_norm: float) -> float:
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = max_grad_norm
            with hidden(self._model, self._whole):
                self._engine.step()
            norm = self._engine.get_global_grad_norm()
            skipped = bool(getattr(self._engine.optimizer, "overflow", False)) or norm is None
            grad_norm = math.inf if skipped else float(norm)
        else:
            grad_norm = self._step_plain_optimizer(max_grad_norm)
        return grad_norm

    def _step_plain_optimizer(self, max_grad_norm: float) -> float:
        """Stage 0 in float32: a plain torch optimizer, whose gradients are whole on every rank."""
        parameters = [parameter for group in self._group_parameters for parameter in group]
        grad_norm = gradient_norm(p.grad for p in parameters if p.grad is not None)
        if not math.isfinite(grad_norm):
            self._engine.zero_grad()  # the step below then finds nothing to do
        elif max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(grad_norm))
        self._engine.step()
        return grad_norm

    # -- states --------------------------------------------------------------------------------------------------------

    @contextmanager
    def model_in_step(self) -> Iterator[nn.Module]:
        """See `Engine.model_in_step`."""
        try:
            yield self._model
        finally:
            if self._stage == 3:  # what was fetched ahead for a backward pass that did not come
                with hidden(self._model, self._whole):
                    self._engine.empty_partition_cache()

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.whole_model`. Under ZeRO-3 the weights are gathered for the time of the context."""
        if self._stage < 3:
            return nullcontext(self._model)
        return _Gathered(self._model, self._engine.optimizer.parameter_offload, self._whole)

    def parameter_states(self) -> Iterator[ParameterState]:
        """See `Engine.parameter_states`."""
        self._link_moments()
        flat = {id(p): pieces for p, pieces in self._replicated_state()}
        updates = self._updates_by_parameter()
        for name, parameter in trained(self._model):
            count = updates[id(parameter)]
            if id(parameter) in flat:
                moments = {key: to_cpu(piece) for key, piece in flat[id(parameter)].items()}
                yield ParameterState(name, moments.pop("weight"), moments, count)
                continue
            moments = {
                key: to_cpu(safe_get_full_optimizer_state(parameter, key)) for key in (ADAM_MOMENTS if count else ())
            }
            yield ParameterState(name, to_cpu(safe_get_full_fp32_param(parameter)), moments, count)

    def saved_parameters(self, keeper: Keeper) -> Iterator[SavedParameter]:
        """See `Engine.saved_parameters`."""
        self._link_moments()
        parameters = dict(trained(self._model))
        flat = {id(p): pieces for p, pieces in self._replicated_state()}
        updates = self._updates_by_parameter()
        fragments = None if flat or self._stage == 3 else Fragments(list(parameters.values()), self.device)
        for name, parameter in parameters.items():
            count = updates[id(parameter)]
            keys = ADAM_MOMENTS if count else ()
            own: Callable[[str], torch.Tensor]
            if fragments is not None:
                places = fragments.places(parameter)
                owner = keeper.owner(name, [length for _, length in places])
                weight = fragments.weight_at(owner, parameter, keeper)
                own = partial(own_fragment, parameter)
            elif self._stage == 3:
                sharded = cast(Any, parameter)
                owner, length = keeper.owner(name), sharded.ds_tensor.numel()
                places = even_places(length, sharded.ds_numel, self._world_size)
                local = safe_get_local_fp32_param(parameter)
                weight = gathered_at(owner, keeper, local, length, sharded.ds_shape, self.device)
                own = partial(safe_get_local_optimizer_state, parameter)
            else:
                owner = keeper.owner(name)
                places = whole_place(owner, parameter.numel(), self._world_size)
                pieces = flat[id(parameter)]
                weight = kept_at(owner, self._rank, keeper, pieces["weight"])
                own = {key: piece.flatten() for key, piece in pieces.items()}.__getitem__
            # one at a time: those that come from NVMe share memory
            moments = {key: copy_for(keeper, own(key)[: places[self._rank][1]]) for key in keys}
            yield SavedParameter(name, weight, moments, places, count)

    def load_parameter_states(self, states: Iterator[ParameterState]) -> None:
        """See `Engine.load_parameter_states`."""
        self._make_moments()
        flat = {id(p): pieces for p, pieces in self._replicated_state()}
        parameters = dict(trained(self._model))
        counts: dict[int, int] = {}
        for state in states:
            parameter = parameters.get(state.name)
            if parameter is None:
                continue
            check_moments(state, ADAM_MOMENTS)
            counts[id(parameter)] = state.num_updates
            if id(parameter) in flat:
                pieces = flat[id(parameter)]
                pieces["weight"].copy_(state.weight)
                for key, moment in state.moments.items():
                    pieces[key].copy_(moment)
                if parameter.dtype != torch.float32:
                    parameter.data.copy_(state.weight)
                continue
            self._set_partitioned(parameter, state)
        self._set_updates(counts)

    def _set_partitioned(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Give this rank its part of the master weight and the moments."""
        if self._stage < 3:
            safe_set_full_fp32_param(parameter, state.weight.to(self.device))
            for key, moment in state.moments.items():
                safe_set_full_optimizer_state(parameter, moment.to(self.device), key)
            return
        # safe_set_full_* of 0.19.8 raises for a parameter that does not divide by the world: the last part is padded
        length = cast(Any, parameter).ds_tensor.numel()

        def part(whole: torch.Tensor) -> torch.Tensor:
            own = whole.flatten()[self._rank * length : (self._rank + 1) * length]
            return nn.functional.pad(own, (0, length - own.numel())).to(self.device)

        safe_set_local_fp32_param(parameter, part(state.weight))
        for key, moment in state.moments.items():
            safe_set_local_optimizer_state(parameter, part(moment), key)

    def fixed_states(self, keeper: Keeper | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.fixed_states`."""
        for name, buffer in saved_buffers(self._model):
            yield name, kept_by(keeper, name, self._rank)(buffer)
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                with self._gathered([parameter]):
                    yield name, kept_by(keeper, name, self._rank)(parameter.data)

    def scaler_state(self) -> dict[str, float]:
        """See `Engine.scaler_state`."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {
            key: float(getattr(scaler, key))
            for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        }

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """See `Engine.load_scaler_state`."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return
        for key, value in state.items():
            setattr(scaler, key, value if key == "cur_scale" else int(value))

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()

    # -- DeepSpeed's ways of keeping them ------------------------------------------------------------------------------

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not sharded:
            return nullcontext()
        return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(sharded))

    def _undo_first_step(self) -> None:
        """Take back the step with zero gradients by which stage 0 in bfloat16 makes its moments: it has decayed the
        master weights at the full learning rate, and Adam would count one update too many."""
        inner = self._inner_optimizer()
        inner.state.clear()
        for group in inner.param_groups:
            if "step" in group:  # DeepSpeed's FusedAdam counts here
                group["step"] = 0
        for parameter, pieces in self._replicated_state():
            pieces["weight"].copy_(parameter.data)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that was handed in, below ZeRO's or the half-precision wrapper."""
        return cast(torch.optim.Optimizer, self._engine.basic_optimizer)

    def _set_updates(self, counts: dict[int, int]) -> None:
        """Let every group go on counting from what its parameters have had (bias correction depends on it)."""
        inner = self._inner_optimizer()
        self._group_updates = [
            max((counts.get(id(p), 0) for p in group), default=0) for group in self._group_parameters
        ]
        for number, group in enumerate(inner.param_groups):
            if type(inner).__name__ == "FusedAdam":
                group["step"] = self._group_updates[number]  # DeepSpeed's FusedAdam counts once a group
        for number, master in self._masters():
            state = inner.state[master]
            if "step" in state:
                state["step"] = _same_kind(state["step"], self._group_updates[number])

    def _make_moments(self) -> None:
        """Give the optimizer the state that it has after a step, with zeros to be filled."""
        inner = self._inner_optimizer()
        for number, (_, master) in enumerate(self._masters()):
            state = inner.state[master]
            with self._brought_in(number):
                for key in ADAM_MOMENTS:
                    if key in state:  # NVMe keeps the tensor in mind that it has once swapped out
                        state[key].zero_()
                    else:
                        state[key] = torch.zeros_like(master.data, dtype=torch.float32)
                # torch's Adam and AdamW count in a tensor
                state["step"] = torch.zeros((), device=master.device) if isinstance(inner, torch.optim.Adam) else 0
        self._link_moments()

    @contextmanager
    def _brought_in(self, number: int) -> Iterator[None]:
        """Hold the master and moments of this number of `_masters` in memory, where they are kept on NVMe."""
        wrapped = self._engine.optimizer
        is_away = self._stage == 3 and wrapped._swappable_optimizer_subgroup(number)
        if is_away:
            wrapped._optimizer_states_and_gradient_swap_in(number)
        yield
        if is_away:
            wrapped._optimizer_states_and_gradient_swap_out(number)

    def _masters(self) -> list[tuple[int, torch.Tensor]]:
        """(number of the group, tensor): this rank's float32 tensors that the inner optimizer updates."""
        if self._stage == 3:
            # the groups of the inner optimizer are filled only while it steps
            wrapped = self._engine.optimizer
            masters = wrapped.fp32_partitioned_groups_flat
            return [(wrapped.sub_group_to_group_id[number], master) for number, master in enumerate(masters)]
        groups = enumerate(self._inner_optimizer().param_groups)
        return [(number, master) for number, group in groups for master in group["params"]]

    def _link_moments(self) -> None:
        """Let every parameter find its piece of the partitioned moments (ZeRO 1 and 2).

        DeepSpeed 0.19.8 does so after its first optimizer step, when only the first parameter group has moments yet,
        and then never again: safe_get_full_optimizer_state raises for all other groups.
        """
        wrapped = self._engine.optimizer
        if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state") and self._inner_optimizer().state:
            wrapped._hp_optimizer_states_linked = False
            wrapped._lazy_init_hp_params_optimizer_state()

    def _replicated_state(self) -> Iterator[tuple[nn.Parameter, dict[str, torch.Tensor]]]:
        """See `whole_masters`; nothing where ZeRO partitions them."""
        if self._stage > 0 or hasattr(self._engine.optimizer, "bf16_groups"):
            return iter(())
        return whole_masters(self._inner_optimizer(), self._group_parameters)


class _Gathered(AbstractContextManager[nn.Module]):
    """Holds all weights of a ZeRO-3 model whole on every rank, and through every forward pass until it ends.

    DeepSpeed's hooks would free what a module has used after its first pass, gather it again in the next and compare
    notes, all of it with the other ranks; ranks that generate answers make passes of their own number. So the hooks are
    taken off meanwhile (private names of DeepSpeed 0.19; a test holds that they still do what is said here).
    """

    def __init__(self, model: nn.Module, offload: Any, hidden_parts: list[str]) -> None:
        """`offload`: what set the hooks. `hidden_parts`: submodules that it was not shown."""
        self._model = model
        self._offload = offload
        self._hidden_parts = hidden_parts
        sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        self._context = deepspeed.zero.GatheredParameters(sharded)

    def __enter__(self) -> nn.Module:
        self._offload._remove_module_hooks()
        self._offload.forward_hooks.clear()
        self._offload.backward_hooks.clear()
        self._context.__enter__()
        return self._model

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)
        with hidden(self._model, self._hidden_parts):
            self._offload.setup_zero_stage3_hooks()


def _shard_from_meta(model: nn.Module, resolved: dict[str, Any], precision: str, read_weight: ReadWeight) -> None:
    """Read what is on the meta device and partition it (ZeRO-3), a block at a time, whole in memory only until then."""
    dtype = HALF_TYPES.get(precision, torch.float32)
    model.to(dtype)  # DeepSpeed refuses a partly sharded model of mixed types
    blocks = [*blocks_of(model), *(m for m in model.modules() if m._parameters), model]
    for block in blocks:
        if any(parameter.is_meta for parameter in block.parameters()):
            materialise(model, block, read_weight, dtype)
            deepspeed.zero.Init(module=block, config_dict_or_path=resolved, dtype=dtype)


def _build_optimizer(
    groups: list[dict[str, Any]], engine_json: dict[str, Any], config: TrainConfig, stage: int
) -> tuple[torch.optim.Optimizer, str]:
    """DeepSpeed's own optimizers on GPUs, CPUAdam for offload, torch's fused AdamW where they do not build or apply."""
    if config.optimizer_type == "Muon":
        raise ConfigError("train.optimizer_type Muon is not there with engine deepspeed: take engine fsdp, or AdamW")
    if config.optimizer_type == "Lamb" and stage:
        raise ConfigError(
            f"train.optimizer_type Lamb needs whole layers, and ZeRO-{stage} flattens and cuts them: take stage 0 "
            "(ds_configs/zero0.json), or AdamW"
        )
    if not torch.cuda.is_available():
        # compiling DeepSpeed's CPU ops takes minutes, and torch's fused form is as fast (FACTS: 184 s for FusedAdam)
        return torch_optimizer(groups, config)
    for op in ops_needed(engine_json, config.optimizer_type, has_gpu=True):
        if not is_compiled(op):
            _log.info("DeepSpeed compiles %s now, which takes minutes, once in this environment", op)
    try:
        return _build_deepspeed_optimizer(groups, engine_json, config)
    except Exception as error:  # a compiler or CUDA toolkit that is missing raises one of many kinds
        _log.warning(
            "DeepSpeed's fused optimizer does not build here (%s); torch's takes its place", _first_line(error)
        )
        return torch_optimizer(groups, config)


def _build_deepspeed_optimizer(
    groups: list[dict[str, Any]], engine_json: dict[str, Any], config: TrainConfig
) -> tuple[torch.optim.Optimizer, str]:
    arguments = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    kind, adamw = config.optimizer_type, config.optimizer_type == "AdamW"
    if kind == "Lamb":
        return deepspeed.ops.lamb.FusedLamb(groups, **arguments), "DeepSpeed FusedLamb"
    if offloads_optimizer(engine_json):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=adamw, **arguments), f"DeepSpeed CPUAdam ({kind})"
    return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=adamw, **arguments), f"DeepSpeed FusedAdam ({kind})"


def _check_precision(precision: str, stage: int) -> None:
    if precision == "float16" and stage == 0:
        raise ConfigError(
            "float16 at ZeRO stage 0: DeepSpeed unscales gradients there whose loss it did not scale; take stage 1 or "
            "2 (ds_configs/fp16.json), bfloat16, or engine fsdp"
        )
    accelerator = deepspeed.accelerator.get_accelerator()
    if precision == "float16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"float16 is not supported by DeepSpeed on this {accelerator.device_name()}: take bfloat16 "
            "(train.mixed_precision.mixed_precision_dtype, or fp16.enabled in the engine JSON)"
        )


def _same_kind(count: Any, number: int) -> Any:
    return torch.full_like(count, float(number)) if isinstance(count, torch.Tensor) else number


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
