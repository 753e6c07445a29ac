"""The back ends and stages that are compared, by the names that tables show."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.ds_config import StepShape
from mellow_ds.engine.build import build_engine
from mellow_ds.engine.protocol import Engine
from mellow_ds.world import World


@dataclass(frozen=True)
class BackEnd:
    """One way to compute a step."""

    name: str
    kind: str  # "deepspeed" or "fsdp"
    stage: int  # of ZeRO
    offload: bool = False  # optimizer states (stage 3: parameters too) in CPU memory
    shards_frozen: bool = False  # frozen parts are sharded like the rest, as those of a large model are

    def engine_json(self) -> dict[str, Any]:
        """What a user would write, to have small weights cut too."""
        section: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3 and self.kind == "deepspeed":  # else weights of a small model stay gathered between steps
            section["stage3_param_persistence_threshold"] = 0
        if self.offload:
            section["offload_optimizer"] = {"device": "cpu"}
        if self.offload and self.stage == 3:
            section["offload_param"] = {"device": "cpu"}
        return {"zero_optimization": section}

    def build(
        self, model: nn.Module, config: TrainConfig, world: World, accumulation: int, precision: str = "float32"
    ) -> Engine:
        """The engine on a model, on a CPU."""
        if self.shards_frozen:
            config = replace(config, frozen_whole_megabytes=0)
        shape = StepShape(
            world.size, config.batch_size, accumulation, config.max_grad_norm, config.learning_rate,
            config.weight_decay, precision,
        )  # fmt: skip
        return build_engine(self.kind, model, self.engine_json(), shape, config, torch.device("cpu"))


BACK_ENDS = (
    BackEnd("ZeRO-0", "deepspeed", 0),
    BackEnd("ZeRO-1", "deepspeed", 1),
    BackEnd("ZeRO-2", "deepspeed", 2),
    BackEnd("ZeRO-3", "deepspeed", 3),
    BackEnd("ZeRO-2, offload", "deepspeed", 2, offload=True),
    BackEnd("ZeRO-3, offload", "deepspeed", 3, offload=True),
    BackEnd("ZeRO-3, frozen sharded", "deepspeed", 3, shards_frozen=True),
    BackEnd("DDP", "fsdp", 0),
    BackEnd("FSDP2 stage 1", "fsdp", 1),
    BackEnd("FSDP2 stage 2", "fsdp", 2),
    BackEnd("FSDP2 stage 3", "fsdp", 3),
    BackEnd("FSDP2 stage 2, offload", "fsdp", 2, offload=True),
    BackEnd("FSDP2 stage 3, offload", "fsdp", 3, offload=True),
    BackEnd("FSDP2 stage 3, frozen sharded", "fsdp", 3, shards_frozen=True),
)
