"""The DeepSpeed back end: ZeRO 0 to 3 and offload as the engine JSON says. The only file that imports deepspeed."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from mellow_ds.config.schema import TrainConfig
from mellow_ds.data.batch import Batch
from mellow_ds.ds_config import StepShape, offloads_optimizer, resolve_engine_json, zero_stage
from mellow_ds.engine.loss import LossSums, count_step, loss_for_backward
from mellow_ds.engine.optimizer import gradient_norm, parameter_groups, torch_optimizer
from mellow_ds.engine.protocol import ParameterState, StepResult
from mellow_ds.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
_log = logging.getLogger("mellow_ds.engine")


def avoid_cpu_compilation() -> None:
    """On CPUs, keep DeepSpeed from compiling its shared-memory collectives: two minutes before the first step.

    A private name of DeepSpeed 0.19; a test holds that it still does what it says. Call before the engine is built.
    """
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """`Engine` over `deepspeed.initialize`; the process group must exist."""

    def __init__(
        self, model: nn.Module, engine_json: dict[str, Any], shape: StepShape, config: TrainConfig, device: torch.device
    ) -> None:
        _check_precision(shape.precision)
        avoid_cpu_compilation()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = device
        self._stage = zero_stage(engine_json)
        self._world_size = shape.world_size
        self._groups = parameter_groups(model, shape.weight_decay)
        # DeepSpeed rewrites the groups' parameter lists; ours say which parameters a flat group holds
        self._group_parameters = [list(group["params"]) for group in self._groups]
        optimizer, optimizer_name = _build_optimizer(self._groups, engine_json, config)
        resolved = resolve_engine_json(engine_json, shape)
        if offloads_optimizer(engine_json) and not _is_cpu_adam(optimizer):
            resolved["zero_force_ds_cpu_optimizer"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=resolved)
        self._model = cast(nn.Module, self._engine.module)
        self._norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.name = f"DeepSpeed ZeRO-{self._stage} ({optimizer_name}, {shape.precision})"

    def train_step(
        self, batches: Sequence[Batch], learning_rate: float, max_grad_norm: float, num_kinds: int = 0
    ) -> StepResult:
        """See `Engine.train_step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        totals = count_step(batches, self.device)
        sums = LossSums(num_kinds, self.device)
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            batch = batch.to(self.device, non_blocking=True)
            output = self._engine(**batch.model_inputs())
            sums.add(batch, output.loss_sum, output.row_losses)
            self._engine.backward(loss_for_backward(output.loss_sum, totals, self._world_size), scale_wrt_gas=False)
        grad_norm = self._clip_and_step(max_grad_norm)
        _average_statistics(self._norms)
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        loss, kind_losses = sums.over_all_ranks(totals)
        return StepResult(loss, grad_norm, totals.num_answer_tokens, totals.num_examples, skipped, kind_losses)

    def _clip_and_step(self, max_grad_norm: float) -> float:
        if not hasattr(self._engine.optimizer, "clip_grad"):
            # stage 0 in float32: a plain torch optimizer, whose gradients are whole on every rank
            trained = [parameter for group in self._group_parameters for parameter in group]
            grad_norm = gradient_norm(trained)
            if max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, torch.tensor(grad_norm))
            self._engine.step()
            return grad_norm
        self._engine.optimizer.clip_grad = max_grad_norm
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.inf if norm is None else float(norm)

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.whole_model`. Under ZeRO-3 the weights are gathered for the time of the context."""
        return nullcontext(self._model) if self._stage < 3 else _Gathered(self._model)

    def parameter_states(self) -> Iterator[ParameterState]:
        """See `Engine.parameter_states`."""
        self._link_moments()
        flat = {id(p): pieces for p, pieces in self._replicated_state()}
        for name, parameter in _trained(self._model):
            if id(parameter) in flat:
                pieces = dict(flat[id(parameter)])
                yield ParameterState(name, pieces.pop("weight"), pieces)
                continue
            weight = safe_get_full_fp32_param(parameter)
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in self._moment_keys()}
            yield ParameterState(name, _to_cpu(weight), {key: _to_cpu(value) for key, value in moments.items()})

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """See `Engine.load_parameter_states`."""
        self._make_moments(num_updates)
        flat = {id(p): pieces for p, pieces in self._replicated_state(copy=False)}
        parameters = dict(_trained(self._model))
        for state in states:
            parameter = parameters[state.name]
            if id(parameter) in flat:
                pieces = flat[id(parameter)]
                pieces["weight"].copy_(state.weight)
                for key, moment in state.moments.items():
                    pieces[key].copy_(moment)
                if parameter.dtype != torch.float32:
                    parameter.data.copy_(state.weight)
                continue
            self._set_partitioned(parameter, state)

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
            own = whole.flatten()[dist.get_rank() * length : (dist.get_rank() + 1) * length]
            return nn.functional.pad(own, (0, length - own.numel())).to(self.device)

        safe_set_local_fp32_param(parameter, part(state.weight))
        for key, moment in state.moments.items():
            safe_set_local_optimizer_state(parameter, part(moment), key)

    def fixed_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.fixed_state`."""
        state = {name: _to_cpu(buffer) for name, buffer in _saved_buffers(self._model)}
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                with self._gathered([parameter]):
                    state[name] = _to_cpu(parameter.data)
        return state

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
        for key, value in state.items():
            setattr(self._engine.optimizer.loss_scaler, key, value if key == "cur_scale" else int(value))

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        if self._stage < 3:
            return nullcontext()
        return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(parameters))

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that was handed in, below ZeRO's or the half-precision wrapper."""
        return cast(torch.optim.Optimizer, self._engine.basic_optimizer)

    def _moment_keys(self) -> tuple[str, ...]:
        """The moments that exist: none before the first step."""
        for state in self._inner_optimizer().state.values():
            return tuple(key for key in MOMENTS if key in state)
        return ()

    def _make_moments(self, num_updates: int) -> None:
        """Give the optimizer the state that it has after `num_updates` steps, with moments of zero to be filled."""
        if not num_updates:
            return
        inner = self._inner_optimizer()
        torch_counts = isinstance(inner, torch.optim.Adam)  # AdamW is one
        if type(inner).__name__ == "FusedAdam":
            for group in inner.param_groups:
                group["step"] = num_updates  # DeepSpeed's FusedAdam counts once a group
        for master in self._masters():
            count = torch.tensor(float(num_updates), device=master.device) if torch_counts else num_updates
            inner.state[master]["step"] = count
            for key in MOMENTS:
                inner.state[master][key] = torch.zeros_like(master.data, dtype=torch.float32)
        self._link_moments()

    def _masters(self) -> list[torch.Tensor]:
        """This rank's float32 tensors that the inner optimizer updates."""
        if self._stage == 3:
            # the groups of the inner optimizer are filled only while it steps
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._inner_optimizer().param_groups for master in group["params"]]

    def _link_moments(self) -> None:
        """Let every parameter find its piece of the partitioned moments (ZeRO 1 and 2).

        DeepSpeed 0.19.8 does so after its first optimizer step, when only the first parameter group has moments yet,
        and then never again: safe_get_full_optimizer_state raises for all other groups.
        """
        wrapped = self._engine.optimizer
        if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state") and self._moment_keys():
            wrapped._hp_optimizer_states_linked = False
            wrapped._lazy_init_hp_params_optimizer_state()

    def _replicated_state(self, copy: bool = True) -> Iterator[tuple[nn.Parameter, dict[str, torch.Tensor]]]:
        """(parameter, weight and moments) where stage 0 keeps them whole on every rank: one tensor a parameter, or one
        flat tensor a group under half precision. Nothing where ZeRO partitions them."""
        inner = self._inner_optimizer()
        if self._stage > 0 or hasattr(self._engine.optimizer, "bf16_groups"):
            return
        for parameters, group in zip(self._group_parameters, inner.param_groups, strict=True):
            masters = group["params"]
            flat = len(masters) == 1 and masters[0].numel() == sum(p.numel() for p in parameters)
            offset = 0
            for number, parameter in enumerate(parameters):
                master = masters[0] if flat else masters[number]
                start, length = (offset, parameter.numel()) if flat else (0, parameter.numel())
                offset += parameter.numel()
                pieces = {"weight": master.data, **{k: v for k, v in inner.state[master].items() if k in MOMENTS}}
                views = {key: t.reshape(-1).narrow(0, start, length).view(parameter.shape) for key, t in pieces.items()}
                yield parameter, ({key: _to_cpu(view) for key, view in views.items()} if copy else views)


class _Gathered(AbstractContextManager[nn.Module]):
    """Holds all weights of a ZeRO-3 model whole on every rank."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._context = deepspeed.zero.GatheredParameters(list(model.parameters()))

    def __enter__(self) -> nn.Module:
        self._context.__enter__()
        return self._model

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)


def _build_optimizer(
    groups: list[dict[str, Any]], engine_json: dict[str, Any], config: TrainConfig
) -> tuple[torch.optim.Optimizer, str]:
    """DeepSpeed's FusedAdam on GPUs, its CPUAdam for offload, torch's fused AdamW where they do not build or apply."""
    arguments = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    adamw = config.optimizer_type == "AdamW"
    if not torch.cuda.is_available():
        # compiling DeepSpeed's CPU ops takes minutes, and torch's fused form is as fast (FACTS: 184 s for FusedAdam)
        return torch_optimizer(groups, config)
    try:
        if offloads_optimizer(engine_json):
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=adamw, **arguments)
            return optimizer, f"DeepSpeed CPUAdam ({config.optimizer_type})"
        optimizer = deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=adamw, **arguments)
        return optimizer, f"DeepSpeed FusedAdam ({config.optimizer_type})"
    except Exception as error:  # a compiler or CUDA toolkit that is missing raises one of many kinds
        _log.warning(
            "DeepSpeed's fused optimizer does not build here (%s); torch's takes its place", _first_line(error)
        )
        return torch_optimizer(groups, config)


def _check_precision(precision: str) -> None:
    accelerator = deepspeed.accelerator.get_accelerator()
    if precision == "float16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"float16 is not supported by DeepSpeed on this {accelerator.device_name()}: take bfloat16 "
            "(train.mixed_precision.mixed_precision_dtype, or fp16.enabled in the engine JSON)"
        )


def _is_cpu_adam(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a state dict holds: BatchNorm statistics, not what a module computes for itself."""
    saved = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _average_statistics(norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    """Give all ranks the mean of their BatchNorm statistics, after each step (a collective call).

    Each rank sees its own micro-batches. Training does not read the statistics, evaluation and checkpoints do; equal on
    all ranks at every step, they do not depend on when a run was saved or resumed. Frozen ones do not move.
    """
    statistics = [s for norm in norms if norm.training for s in (norm.running_mean, norm.running_var) if s is not None]
    if not statistics or dist.get_world_size() == 1:
        return
    flat = torch.cat([statistic.flatten() for statistic in statistics])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for statistic, mean in zip(statistics, flat.split([s.numel() for s in statistics]), strict=True):
        statistic.copy_(mean)


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, floating-point numbers as float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
