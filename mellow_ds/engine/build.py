"""Choosing the back end."""

from typing import Any

import torch
from torch import nn

from mellow_ds.config.schema import TrainConfig
from mellow_ds.ds_config import StepShape
from mellow_ds.engine.protocol import Engine
from mellow_ds.errors import ConfigError


def build_engine(
    kind: str,
    model: nn.Module,
    engine_json: dict[str, Any],
    shape: StepShape,
    config: TrainConfig,
    device: torch.device,
) -> Engine:
    """The engine that `kind` asks for ("auto" takes DeepSpeed); imports the back end only now."""
    if kind == "fsdp":
        raise ConfigError("engine fsdp is not there yet in this version: use engine auto or deepspeed")
    try:
        from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine
    except ImportError as error:
        raise ConfigError(f"DeepSpeed cannot be imported ({error}): install it, see README.md") from None
    return DeepSpeedEngine(model, engine_json, shape, config, device)
