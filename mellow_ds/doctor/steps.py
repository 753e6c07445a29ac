"""The arithmetic of a run's steps: what batch, world and epochs come to. Everything follows from configuration and
counts."""

from dataclasses import dataclass

from mellow_ds.data.order import BatchPlan, steps_per_epoch
from mellow_ds.doctor.facts import Case
from mellow_ds.ds_config import StepShape, choose_precision, zero_stage
from mellow_ds.world import World


@dataclass(frozen=True)
class StepArithmetic:
    """How a run is cut into steps."""

    world: int
    rank_batch_size: int  # examples of a micro-batch
    global_batch_size: int
    micro_batches: int  # of a rank and step
    epoch_steps: int  # 0: the number of examples is not known
    total_steps: int  # 0: likewise
    last_step: int  # where this start ends, by train.stop_at_step

    @property
    def largest_rank_share(self) -> int:
        """Examples that a rank takes of a full step."""
        return -(-self.global_batch_size // self.world)


def step_arithmetic(case: Case) -> StepArithmetic:
    """Raises `ConfigError` where the global batch is smaller than the world."""
    train, world = case.config.train, case.machine.world
    plan = BatchPlan.from_config(train, World(size=world, launcher="--world"))
    epoch_steps = 0
    if case.shards is not None:
        epoch_steps = steps_per_epoch(case.shards.num_epoch_examples, plan.global_batch_size)
    total = train.max_steps or train.num_epochs * epoch_steps
    last = min(train.stop_at_step or total, total) if total else train.stop_at_step
    return StepArithmetic(world, train.batch_size, plan.global_batch_size, plan.micro_batches, epoch_steps, total, last)


def precision_of(case: Case) -> str:
    """One of "float32", "bfloat16" or "float16"."""
    return choose_precision(case.config.train.mixed_precision, case.engine_json, case.machine.on_gpus)


def stage_of(case: Case) -> int:
    """The ZeRO stage. Raises `ConfigError` for one that there is not."""
    return zero_stage(case.engine_json)


def step_shape(case: Case, steps: StepArithmetic) -> StepShape:
    """What the engine is told of a step."""
    train = case.config.train
    return StepShape(
        world_size=steps.world,
        rank_batch_size=train.batch_size,
        accumulation=steps.micro_batches,
        max_grad_norm=train.max_grad_norm,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        precision=precision_of(case),
    )
