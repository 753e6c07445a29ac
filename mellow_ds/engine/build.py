"""Choosing the back end."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mellow_ds.config.train_keys import PYTORCH_OPTIMIZERS, TrainConfig
from mellow_ds.ds_config import StepShape, zero_stage
from mellow_ds.engine.extension_lock import check_extension_locks
from mellow_ds.engine.protocol import Engine
from mellow_ds.engine.step import all_true, first_rank_where
from mellow_ds.errors import ConfigError, FaultError, MellowError
from mellow_ds.log import ALIKE
from mellow_ds.model.meta import ReadWeight, materialise

_log = logging.getLogger("mellow_ds.engine")


def build_engine(
    kind: str,
    model: nn.Module,
    engine_json: dict[str, Any],
    shape: StepShape,
    config: TrainConfig,
    device: torch.device,
    read_weight: ReadWeight | None = None,
) -> Engine:
    """The engine that `kind` asks for; imports the back end only now (a collective call).

    "auto" takes DeepSpeed, and FSDP2 with a warning where DeepSpeed cannot be imported or initialised on every rank,
    or has not what is asked for. `read_weight` gives the parameters of a model that are on the meta device.
    """
    if read_weight is not None and not shards_parameters(kind, engine_json, config.optimizer_type):
        materialise(model, model, read_weight)
    if kind == "auto" and config.optimizer_type in PYTORCH_OPTIMIZERS:
        what = "engine auto: %s needs whole matrices, which ZeRO cuts; FSDP2 takes the place of DeepSpeed"
        _log.warning(what, config.optimizer_type, extra=ALIKE)
        kind = "fsdp"
    if kind == "auto" and shape.precision == "float16" and not zero_stage(engine_json):
        what = "engine auto: DeepSpeed does not scale a loss at stage 0; DDP takes its place for float16"
        _log.warning(what, extra=ALIKE)
        kind = "fsdp"
    if kind != "fsdp":
        engine, reason = _try_deepspeed(model, engine_json, shape, config, device, read_weight)
        if engine is not None:
            return engine
        if kind == "deepspeed":
            reason = reason or "DeepSpeed cannot be used on another rank"
            raise ConfigError(f"engine deepspeed: {reason}; install it (see README.md), or take engine auto or fsdp")
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise FaultError(f"DeepSpeed failed half-way ({reason}): start again with engine fsdp")
        if first_rank_where(bool(reason), device) == dist.get_rank():  # one says it, and it knows why
            _log.warning("engine auto: %s; FSDP2 takes its place", reason)
    from mellow_ds.engine.fsdp_engine import FSDPEngine

    return FSDPEngine(model, engine_json, shape, config, device, read_weight)


def shards_parameters(kind: str, engine_json: dict[str, Any], optimizer_type: str) -> bool:
    """Whether a rank holds only its part of the parameters: ZeRO-3, and FSDP2 at every stage but 0."""
    is_pytorch = kind == "fsdp" or (kind == "auto" and optimizer_type in PYTORCH_OPTIMIZERS)
    return zero_stage(engine_json) > (0 if is_pytorch else 2)


def _try_deepspeed(
    model: nn.Module,
    engine_json: dict[str, Any],
    shape: StepShape,
    config: TrainConfig,
    device: torch.device,
    read_weight: ReadWeight | None,
) -> tuple[Engine | None, str]:
    """(the engine, "") or (None, why), one of them on all ranks; why is "" where it is another rank's doing.

    What the user has to correct is raised.
    """
    engine, reason = None, ""
    try:
        from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine
    except Exception as error:  # a broken installation raises more than ImportError
        reason = f"DeepSpeed cannot be imported ({_first_line(error)})"
    # all of them agree before any waits for the others in DeepSpeed's own collectives
    if all_true(not reason, device):
        if device.type == "cuda":
            check_extension_locks()  # on CPUs nothing is compiled
        try:
            engine = DeepSpeedEngine(model, engine_json, shape, config, device, read_weight)
        except MellowError:
            raise
        except Exception as error:
            reason = f"DeepSpeed cannot be initialised ({_first_line(error)})"
        if all_true(engine is not None, device):
            return engine, ""
    return None, reason


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
