"""Findings about how an optimizer step is cut: global batch, world, micro-batch, accumulation, the engine JSON."""

from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.steps import step_arithmetic, step_shape
from mellow_ds.ds_config import resolve_engine_json
from mellow_ds.errors import ConfigError

_SMALL_MICRO_BATCH = 4  # examples: below, a GPU waits for its kernels to be launched
_WASTED_PART = 0.15  # of the places in the micro-batches of a step that may stay empty before it is said


def check_batch(case: Case) -> list[Finding]:
    """Global batch against world, and what is left over."""
    train, world = case.config.train, case.machine.world
    try:
        steps = step_arithmetic(case)
    except ConfigError:
        return [
            Finding(
                STOPS, "batch-below-world",
                f"train.global_batch_size is {train.global_batch_size}, but {world} ranks train",
                "every rank takes part in every step and needs at least one example of it",
                f"raise train.global_batch_size to {world} or more, or start fewer ranks",
            )
        ]  # fmt: skip
    found = [*_contradictions(case)]
    places = steps.world * steps.rank_batch_size * steps.micro_batches
    empty = places - steps.global_batch_size
    if empty / places > _WASTED_PART:
        fitting = -(-steps.largest_rank_share // steps.micro_batches)
        found.append(
            Finding(
                SLOW, "batch-does-not-fill",
                f"a step of {steps.global_batch_size} examples on {world} ranks is cut into {steps.micro_batches} "
                f"micro-batches of at most {train.batch_size} a rank, which have {places} places",
                f"{100 * empty / places:.0f} percent of the places stay empty, and ranks with fewer examples wait for "
                "those with more",
                f"make train.global_batch_size a multiple of {world} x train.batch_size, or set train.batch_size to "
                f"{fitting}",
            )
        )  # fmt: skip
    elif steps.global_batch_size % world:
        found.append(
            Finding(
                NOTE, "batch-uneven",
                f"{steps.global_batch_size} examples a step do not divide by {world} ranks",
                "some ranks take one example more than others; the loss counts tokens, so results are right",
                f"a train.global_batch_size that is a multiple of {world} keeps all ranks equally busy",
            )
        )  # fmt: skip
    if case.machine.on_gpus and steps.micro_batches > 1 and train.batch_size < _SMALL_MICRO_BATCH:
        found.append(
            Finding(
                SLOW, "micro-batch-small",
                f"{steps.micro_batches} micro-batches of {train.batch_size} examples make up a step of a rank",
                "GPUs run larger micro-batches faster, example for example",
                "raise train.batch_size as far as memory allows; with train.global_batch_size the step stays the same",
            )
        )  # fmt: skip
    return [*found, *_last_step(case)]


def _contradictions(case: Case) -> list[Finding]:
    try:
        resolve_engine_json(case.engine_json, step_shape(case, step_arithmetic(case)))
    except ConfigError as error:
        return [
            Finding(
                STOPS, "engine-json", str(error),
                "batch, accumulation, precision, clipping, learning rate and schedule belong to the run configuration",
                'write "auto" for them in the engine JSON, or drop the key, and set the run\'s key',
            )
        ]  # fmt: skip
    return []


def _last_step(case: Case) -> list[Finding]:
    """The last step of an epoch, and epochs of hardly a step."""
    if case.shards is None or not case.shards.num_epoch_examples:
        return []
    steps, num_examples = step_arithmetic(case), case.shards.num_epoch_examples
    if num_examples < steps.global_batch_size:
        return [
            Finding(
                SLOW, "epoch-below-batch",
                f"an epoch has {num_examples} examples, fewer than the {steps.global_batch_size} of a step",
                "every step is an epoch of its own, and part of each micro-batch stays empty",
                "lower train.global_batch_size (or batch size, accumulation, ranks), or name more shards",
            )
        ]  # fmt: skip
    left = num_examples % steps.global_batch_size
    if not left:
        return []
    idle = max(steps.world - left, 0)
    reason = "every example is seen once an epoch; the loss is a mean over its tokens, so it has the weight of a step"
    if idle:
        reason += f"; {idle} ranks have nothing in it and keep step with silence"
    return [
        Finding(
            NOTE, "last-batch-partial",
            f"the last step of an epoch has {left} of {steps.global_batch_size} examples", reason,
            "nothing to do, unless its noise is unwanted: choose a global batch that divides "
            f"{num_examples} with less left over",
        )
    ]  # fmt: skip
