"""Bytes that a rank holds, by formula: weights, gradients and optimizer state by stage, precision and offload.

T trained and F frozen parameters, N ranks, s bytes of a number in the compute format (4, or 2 in half precision).
Measured on DeepSpeed 0.19.8 by walking every tensor of a rank (tests/doctor/test_against_engines.py).

| stage | weights | gradients | float32 masters | moments (Adam, AdamW, Lamb) |
| --- | --- | --- | --- | --- |
| 0 | s (T + F) | s T | 4 T in half precision, else none | 8 T |
| 1 | s (T + F) | s T while micro-batches accumulate, else s T / N | 4 T / N | 8 T / N |
| 2 | s (T + F) | s T / N | 4 T / N | 8 T / N |
| 3 | s (T + F) / N and s x what stays whole | s T / N | 4 T / N | 8 T / N |

DeepSpeed keeps masters apart from the weights in float32 too (stages 1 to 3). At stage 3 tensors up to
stage3_param_persistence_threshold numbers stay whole beside their part, frozen parts up to
train.frozen_whole_megabytes whole without one. Muon keeps one moment of a matrix, 4 bytes in place of 8.

Offload moves masters, moments and gradients to the host, and keeps gradients there as float32 too (4 T / N).

What a step needs besides: the reduction buckets, a float32 copy of the gradients in half precision (during the
optimizer step, when activations are gone), and at stage 3 the parameters that are gathered at once.
"""

from dataclasses import dataclass
from typing import Any

from mellow_ds.config.train_keys import PYTORCH_OPTIMIZERS
from mellow_ds.doctor.facts import ActivationFacts, Case, ModelFacts, PartFacts
from mellow_ds.doctor.steps import precision_of, stage_of, step_arithmetic
from mellow_ds.ds_config import offload_device

GIGABYTE = 10**9
_MEGABYTE = 10**6
_MASTER = _COPY = 4  # bytes of a float32 number
_MOMENT = 4
_BUCKET_NUMBERS = 500_000_000  # DeepSpeed's reduce_bucket_size where the JSON has none
_SMALL_NUMBERS = 100_000  # DeepSpeed's stage3_param_persistence_threshold where the JSON has none
_MAX_LIVE = _MAX_REUSE = 1_000_000_000  # stage3_max_live_parameters, stage3_max_reuse_distance
_PREFETCH_NUMBERS = 50_000_000  # stage3_prefetch_bucket_size
_DDP_BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Setup:
    """What the formula depends on besides the model."""

    back_end: str  # "deepspeed" or "fsdp"
    stage: int
    world: int
    number_bytes: int  # s: 4 in float32, 2 in half precision
    accumulates: bool = False  # more than one micro-batch a step
    optimizer_type: str = "AdamW"
    offload_optimizer: str = "none"  # none, cpu or nvme
    offload_param: str = "none"
    bucket_numbers: int = _BUCKET_NUMBERS
    num_buckets: int = 1  # DeepSpeed's contiguous gradients: one buffer, two with overlap_comm, 0 without
    max_live: int = _MAX_LIVE
    max_reuse: int = _MAX_REUSE
    prefetch_numbers: int = _PREFETCH_NUMBERS
    frozen_whole_bytes: float = 0.0  # of a frozen part, as float32, up to which it stays whole at stage 3


@dataclass(frozen=True)
class StateBytes:
    """What one rank holds of model and optimizer, from step to step and within one."""

    weights: int
    gradients: int
    masters: int
    moments: int
    staging: int = 0  # what offload keeps besides: gradients as float32, and a place for a parameter on its way
    gathered: int = 0  # stage 3: whole parameters that are there at once
    buckets: int = 0  # while gradients are reduced
    step_copy: int = 0  # during the optimizer step
    host: int = 0  # of all of these, what lies in the host's memory instead
    nvme: int = 0  # or on a disk

    @property
    def lasting(self) -> int:
        """On the device when gradients are complete: weights, gradients, masters, moments, less what is offloaded."""
        return self.total - self.host - self.nvme

    @property
    def total(self) -> int:
        """The same wherever it lies."""
        return self.weights + self.gradients + self.masters + self.moments + self.staging


def readable(num_bytes: float) -> str:
    """Bytes for people."""
    if num_bytes < GIGABYTE:
        return f"{num_bytes / _MEGABYTE:.0f} MB" if num_bytes >= 10 * _MEGABYTE else f"{num_bytes / _MEGABYTE:.1f} MB"
    return f"{num_bytes / GIGABYTE:.1f} GB" if num_bytes >= 10 * GIGABYTE else f"{num_bytes / GIGABYTE:.2f} GB"


def small_threshold(engine_json: dict[str, Any]) -> int:
    """Numbers of a tensor up to which ZeRO-3 keeps it whole."""
    return int(_zero(engine_json).get("stage3_param_persistence_threshold", _SMALL_NUMBERS))


def setup_of(case: Case, stage: int | None = None, back_end: str = "") -> Setup:
    """The setup of a run; with another stage or back end where one is given."""
    zero, config = _zero(case.engine_json), case.config
    stage = stage_of(case) if stage is None else stage
    steps = step_arithmetic(case)
    overlaps = zero.get("overlap_comm", stage == 3)
    contiguous = zero.get("contiguous_gradients", True)
    return Setup(
        back_end=back_end or back_end_of(case),
        stage=stage,
        world=steps.world,
        number_bytes=4 if precision_of(case) == "float32" else 2,
        accumulates=steps.micro_batches > 1,
        optimizer_type=config.train.optimizer_type,
        offload_optimizer=offload_device(case.engine_json, "offload_optimizer"),
        offload_param=offload_device(case.engine_json, "offload_param"),
        bucket_numbers=int(zero.get("reduce_bucket_size", _BUCKET_NUMBERS)),
        num_buckets=(0 if not contiguous else 2 if overlaps and stage < 3 else 1),
        max_live=int(zero.get("stage3_max_live_parameters", _MAX_LIVE)),
        max_reuse=int(zero.get("stage3_max_reuse_distance", _MAX_REUSE)),
        prefetch_numbers=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_NUMBERS)),
        frozen_whole_bytes=config.train.frozen_whole_megabytes * 1e6,
    )


def back_end_of(case: Case) -> str:
    """The back end that the run will take, as far as is known here."""
    has_not = case.machine.deepspeed_problem or case.config.train.optimizer_type in PYTORCH_OPTIMIZERS
    if case.config.engine == "fsdp" or (case.config.engine == "auto" and has_not):
        return "fsdp"
    return "deepspeed"


def state_bytes(model: ModelFacts, setup: Setup) -> StateBytes:
    """What a rank holds of `model`."""
    return _fsdp_bytes(model, setup) if setup.back_end == "fsdp" else _deepspeed_bytes(model, setup)


def bytes_a_parameter(
    stage: int, world: int, number_bytes: int, offload_optimizer: str = "none", offload_param: str = "none"
) -> tuple[float, float, float]:
    """Of a trained parameter: what a rank holds (on its device, in the host's memory, on NVMe) with complete gradients.

    With DeepSpeed, AdamW and no accumulation. Nothing stays whole at stage 3; activations, buckets and what is gathered
    come on top.
    """
    trained = 10**6
    setup = Setup(
        "deepspeed", stage, world, number_bytes, offload_optimizer=offload_optimizer, offload_param=offload_param
    )
    held = state_bytes(_plain_model(trained), setup)
    return held.lasting / trained, held.host / trained, held.nvme / trained


def _deepspeed_bytes(model: ModelFacts, setup: Setup) -> StateBytes:
    s, n, stage = setup.number_bytes, setup.world, setup.stage
    trained = model.num_trained
    parts = n if stage else 1
    weights = sum(_weights(part, setup) for part in model.parts)
    masters = 0 if stage == 0 and s == 4 else _MASTER * trained // parts
    moments = _moments(model, setup.optimizer_type) // parts
    whole_gradients = stage == 0 or (stage == 1 and setup.accumulates)
    gradients = s * trained // (1 if whole_gradients else parts)
    offloads = setup.offload_optimizer if stage else "none"
    step_copy = _COPY * trained // parts if s == 2 and offloads == "none" else 0
    buckets = s * (min(trained, setup.bucket_numbers) if not stage else setup.num_buckets * setup.bucket_numbers)
    host = nvme = staging = 0
    if offloads != "none":
        # gradients of this rank's part go to the host as they are reduced, and are made float32 there
        on_its_way = s * model.largest_parameter if stage < 3 else 0
        staging = _COPY * trained // parts + 2 * on_its_way
        host = staging - on_its_way + (0 if whole_gradients else gradients)
        host, nvme = (host + masters + moments, 0) if offloads == "cpu" else (host, masters + moments)
    if stage == 3 and setup.offload_param != "none":
        own = sum(_partitioned(part, setup) for part in model.parts) * s // n
        host, nvme = (host + own, nvme) if setup.offload_param == "cpu" else (host, nvme + own)
    gathered = _gathered(model, setup) if stage == 3 else 0
    return StateBytes(weights, gradients, masters, moments, staging, gathered, buckets, step_copy, host, nvme)


def _fsdp_bytes(model: ModelFacts, setup: Setup) -> StateBytes:
    """FSDP2 shards float32 parameters and gathers a block in the compute format; DDP (stage 0) casts as it goes."""
    n, stage, trained = setup.world, setup.stage, model.num_trained
    moments = _moments(model, setup.optimizer_type)
    if stage == 0:
        cast = setup.number_bytes * trained if setup.number_bytes == 2 else 0  # autocast keeps what it cast
        return StateBytes(4 * model.num_parameters, 4 * trained, 0, moments, 0, cast, _DDP_BUCKET_BYTES)
    whole = [part for part in model.parts if _stays_whole(part, setup)]
    kept = sum(part.num_parameters for part in whole)
    weights = setup.number_bytes * kept + 4 * (model.num_parameters - kept) // n
    sharded = model.num_parameters - kept
    at_once = sharded if stage < 3 else min(sharded, 2 * model.largest_block + model.largest_parameter)
    accumulated = 4 * trained if stage == 1 and setup.accumulates else 0
    gradients = accumulated or 4 * trained // n
    host = 0
    if setup.offload_optimizer != "none" or setup.offload_param != "none":
        host = 4 * sharded // n + 4 * trained // n + moments // n
    gathered, buckets = setup.number_bytes * at_once, 2 * 4 * model.largest_block
    return StateBytes(weights, gradients, 0, moments // n, 0, gathered, buckets, host=host)


def _weights(part: PartFacts, setup: Setup) -> int:
    s = setup.number_bytes
    if setup.stage < 3 or _stays_whole(part, setup):
        return s * part.num_parameters
    return s * part.num_parameters // setup.world + s * part.num_small


def _partitioned(part: PartFacts, setup: Setup) -> int:
    """Parameters of a part that stage 3 cuts up."""
    return 0 if _stays_whole(part, setup) else part.num_parameters


def _stays_whole(part: PartFacts, setup: Setup) -> bool:
    return part.is_frozen and 4 * part.num_parameters <= setup.frozen_whole_bytes


def _moments(model: ModelFacts, optimizer_type: str) -> int:
    matrices = sum(part.num_trained_matrices for part in model.parts) if optimizer_type == "Muon" else 0
    return _MOMENT * (2 * model.num_trained - matrices)


def stays_gathered(model: ModelFacts, setup: Setup) -> bool:
    """Whether DeepSpeed's stage 3 keeps the whole model gathered while a micro-batch is run.

    It frees a gathered parameter unless that is used again within stage3_max_reuse_distance numbers, which forward and
    backward pass of a smaller model stay below.
    """
    return 2 * _gathered_numbers(model, setup) <= setup.max_reuse and _gathered_numbers(model, setup) <= setup.max_live


def _gathered_numbers(model: ModelFacts, setup: Setup) -> int:
    parts = [part for part in model.parts if not _stays_whole(part, setup)]
    return sum(part.num_parameters - part.num_small for part in parts)


def _gathered(model: ModelFacts, setup: Setup) -> int:
    numbers = _gathered_numbers(model, setup)
    if not stays_gathered(model, setup):
        numbers = min(numbers, model.largest_block + model.largest_parameter + setup.prefetch_numbers)
    return setup.number_bytes * numbers


def _zero(engine_json: dict[str, Any]) -> dict[str, Any]:
    return engine_json.get("zero_optimization") or {}


def _plain_model(trained: int) -> ModelFacts:
    nothing = ActivationFacts(0, 0, 0, 0, 0, 0)
    part = PartFacts("decoder", trained, trained)
    return ModelFacts((part,), 1, 1, 1, 0, False, False, 0, 0, False, nothing)
