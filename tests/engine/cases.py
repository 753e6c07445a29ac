"""What the tests of all back ends share: a reference in plain PyTorch, and steps cut for a world."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.batch import Batch
from mellow_ds.ds_config import StepShape
from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine
from mellow_ds.engine.fsdp_engine import FSDPEngine
from mellow_ds.engine.step import StepEngine
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import TRAIN, batch_of, small_model
from mellow_ds.world import World

NUM_STEPS = 4
EXAMPLES = [list(range(7 * step, 7 * step + 7)) for step in range(NUM_STEPS - 1)] + [[50]]  # the last has one example
ENGINES: dict[str, type[StepEngine]] = {"deepspeed": DeepSpeedEngine, "fsdp": FSDPEngine}


def reference(
    num_steps: int = NUM_STEPS, make: Callable[[], MellowForConditionalGeneration] | None = None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of one process with one big batch, in plain PyTorch.

    `make`: another model than that of seed 1.
    """
    model = make() if make else small_model(seed=1)
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embed" not in name]
    plain = [p for name, p in parameters.items() if p.ndim < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": TRAIN.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN.learning_rate)
    losses, norms = [], []
    for numbers in EXAMPLES[:num_steps]:
        loss = model(**batch_of(numbers, model.num_audio_tokens).model_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip(model))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in parameters.items()}


def clip(model: torch.nn.Module) -> float:
    """What `torch.nn.utils.clip_grad_norm_` does, from a norm in float64: its own is off by 1e-4 for larger models."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in parameters]))
    torch.nn.utils.clip_grads_with_norm_(parameters, TRAIN.max_grad_norm, norm.float())
    return float(norm)


def shape(world: World, accumulation: int, precision: str = "float32") -> StepShape:
    """Four examples a micro-batch."""
    return StepShape(
        world.size, 4, accumulation, TRAIN.max_grad_norm, TRAIN.learning_rate, TRAIN.weight_decay, precision
    )


def make_engine(
    kind: str,
    model: torch.nn.Module,
    stage: int,
    world: World,
    accumulation: int = 2,
    config: TrainConfig = TRAIN,
    precision: str = "float32",
    **zero_optimization: Any,
) -> StepEngine:
    """An engine of either back end at a ZeRO stage; at stage 3 every weight is cut, small ones too."""
    cut = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    engine_json = {"zero_optimization": {"stage": stage, **cut, **zero_optimization}}
    return ENGINES[kind](model, engine_json, shape(world, accumulation, precision), config, torch.device("cpu"))


def allow_float16() -> None:
    """Have DeepSpeed take float16 on this CPU, which it refuses where the processor has no such arithmetic."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda _: True


def micro_batches(numbers: list[int], world: World, accumulation: int, audio_tokens: int) -> list[Batch]:
    """This rank's part of the step, cut unevenly, some of it empty."""
    n = len(numbers)
    own = numbers[n * world.rank // world.size : n * (world.rank + 1) // world.size]
    cuts = [len(own) * part // accumulation for part in range(accumulation + 1)]
    return [batch_of(own[a:b], audio_tokens) for a, b in pairwise(cuts)]


def train(
    engine: StepEngine, audio_tokens: int, world: World, accumulation: int, steps: list[list[int]]
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of these steps."""
    results = [
        engine.train_step(micro_batches(n, world, accumulation, audio_tokens), TRAIN.learning_rate, TRAIN.max_grad_norm)
        for n in steps
    ]
    return [r.loss for r in results], [r.grad_norm for r in results]


def with_train(**changes: Any) -> TrainConfig:
    """The tests' configuration with some keys changed."""
    return replace(TRAIN, **changes)
