"""The engine JSON: read, checked against the run configuration, its "auto" values filled in. No torch, no DeepSpeed.

Batch, accumulation, precision, clipping and learning rate belong to the run configuration; the JSON says "auto" there,
and a value that contradicts the run is refused by name.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellow_ds.config.train_keys import MixedPrecisionConfig, TrainConfig
from mellow_ds.errors import ConfigError

AUTO = "auto"
# where --deepspeed_config is not given; DeepSpeed's default all-reduces gradients that it could reduce-scatter
DEFAULT_ENGINE_JSON: dict[str, Any] = {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}
_STEPS_PER_PRINT = 10**9  # our own log speaks


@dataclass(frozen=True)
class StepShape:
    """What the run configuration decides about an optimizer step, for one world."""

    world_size: int
    rank_batch_size: int  # examples of a micro-batch
    accumulation: int  # micro-batches of an optimizer step
    max_grad_norm: float  # 0: no clipping
    learning_rate: float
    weight_decay: float
    precision: str  # "float32", "bfloat16" or "float16"

    @property
    def nominal_batch_size(self) -> int:
        """What DeepSpeed calls train_batch_size; the true global batch may be smaller (ranks need not divide it)."""
        return self.rank_batch_size * self.accumulation * self.world_size


def read_engine_json(path: str) -> dict[str, Any]:
    """The content of an engine JSON; ZeRO-2 where `path` is empty."""
    if not path:
        return copy.deepcopy(DEFAULT_ENGINE_JSON)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--deepspeed_config {path} is not there: ds_configs/ has one for each stage") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config {path} is not JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed_config {path} holds a {type(content).__name__}, not an object")
    return content


def zero_stage(engine_json: dict[str, Any]) -> int:
    """The ZeRO stage that the JSON chooses, 0 to 3."""
    stage = engine_json.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"zero_optimization.stage in the engine JSON is {stage!r}; it must be 0, 1, 2 or 3")
    return int(stage)


def choose_precision(mixed: MixedPrecisionConfig, engine_json: dict[str, Any], has_gpu: bool) -> str:
    """One of "float32", "bfloat16" or "float16": what the run says, then the JSON; else bfloat16 on GPUs only."""
    if mixed.use_mixed_precision == "true":
        return mixed.mixed_precision_dtype
    if mixed.use_mixed_precision == "false":
        return "float32"
    for section, precision in (("bf16", "bfloat16"), ("fp16", "float16")):
        if engine_json.get(section, {}).get("enabled") is True:
            return precision
    return mixed.mixed_precision_dtype if has_gpu else "float32"


def offloads_optimizer(engine_json: dict[str, Any]) -> bool:
    """Whether the JSON keeps optimizer states in CPU memory or on NVMe."""
    return offload_device(engine_json, "offload_optimizer") != "none"


def offload_device(engine_json: dict[str, Any], what: str) -> str:
    """Where the JSON keeps `what` ("offload_optimizer" or "offload_param"): "none", "cpu" or "nvme"."""
    section = engine_json.get("zero_optimization", {}).get(what) or {}
    return str(section.get("device") or "none")


def resolve_engine_json(
    engine_json: dict[str, Any], shape: StepShape, source: str = "the engine JSON"
) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: "auto" filled in from the run, contradictions refused by name.

    The optimizer and the schedule are built by this project from the run configuration and handed over, so their
    sections are checked (see also `check_optimizer`) and dropped.
    """
    resolved = copy.deepcopy(engine_json)
    if "scheduler" in resolved:
        raise ConfigError(f"{source} has a scheduler section: that belongs to train.scheduler; drop the section")
    zero_stage(resolved)
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (shape.nominal_batch_size, "train.batch_size, train.global_batch_size and the world"),
        "train_micro_batch_size_per_gpu": (shape.rank_batch_size, "train.batch_size"),
        "gradient_accumulation_steps": (shape.accumulation, "train.global_batch_size"),
        "gradient_clipping": (shape.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (shape.precision == "bfloat16", "train.mixed_precision"),
        "fp16.enabled": (shape.precision == "float16", "train.mixed_precision"),
    }
    for key, (value, owner) in owned.items():
        _fill(resolved, key, value, owner, source)
    _check_rates(resolved.pop("optimizer", {}), shape, source)
    resolved["steps_per_print"] = _STEPS_PER_PRINT
    resolved.setdefault("wall_clock_breakdown", False)
    left = _autos(resolved)
    if left:
        raise ConfigError(f'{source}: "{left[0]}" is "auto", but the run configuration does not own it; give a value')
    return resolved


def _fill(tree: dict[str, Any], dotted: str, value: Any, owner: str, source: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    found = tree.get(key, AUTO)
    if found != AUTO and found != value:
        raise ConfigError(f'{source} says {dotted} {found}, but the run says {value} ({owner}); write "auto" there')
    tree[key] = value


def check_optimizer(engine_json: dict[str, Any], config: TrainConfig, source: str = "the engine JSON") -> None:
    """Refuse an optimizer section that names another optimizer, or other betas and eps, than the run's."""
    section = engine_json.get("optimizer", {})
    params = dict(section.get("params", {}))
    # DeepSpeed takes Adam for AdamW, unless told not to
    is_plain_adam = str(section.get("type")).lower() == "adam" and params.get("adam_w_mode", True) is False
    names = {"adam": "Adam" if is_plain_adam else "AdamW", "adamw": "AdamW", "lamb": "Lamb", "muon": "Muon"}
    found = section.get("type", AUTO)
    named = {"type": names.get(str(found).lower(), found)}
    _fill(named, "type", config.optimizer_type, "train.optimizer_type", f"{source}, optimizer:")
    if isinstance(params.get("betas"), list):
        params["betas"] = tuple(params["betas"])
    for key, value in (("betas", tuple(config.betas)), ("eps", config.eps)):
        _fill(params, key, value, f"train.{key}", f"{source}, optimizer.params:")


def _check_rates(section: dict[str, Any], shape: StepShape, source: str) -> None:
    params = section.get("params", {})
    for key, value, owner in (
        ("lr", shape.learning_rate, "train.learning_rate"),
        ("weight_decay", shape.weight_decay, "train.weight_decay"),
    ):
        _fill(dict(params), key, value, owner, f"{source}, optimizer.params:")


def _autos(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            found.append(prefix + key)
    return found
