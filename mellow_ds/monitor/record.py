"""What is recorded of an optimizer step. Names and scopes are those of metrics.jsonl and TensorBoard."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuReading:
    """What one GPU is doing; of rank 0's device where a step's record holds it."""

    gpu_memory_used_gib: float | None = None
    """GiB in use on the device, by all processes."""
    gpu_memory_total_gib: float | None = None
    """GiB that the device has."""
    gpu_utilisation_percent: float | None = None
    """Percent of the last sample period in which a kernel ran."""
    gpu_power_watts: float | None = None
    """Watts drawn by the device."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Counts and rates are over all ranks of the run; times are rank 0's.

    The trainer makes one a step, with that step's own values. In what the monitor records every few steps the two rates
    and the data wait are means over the steps since the last record; all else is the recorded step's own.
    """

    step: int
    """Optimizer steps done, this one included: the first is 1."""
    epoch: float
    """Passes through the training examples, as a fraction."""
    loss: float
    """Of this step: sum over its answer tokens on all ranks divided by their number."""
    learning_rate: float
    """That this step was made with."""
    grad_norm: float
    """Global L2 norm before clipping."""
    examples_per_second: float
    """Over all ranks."""
    answer_tokens_per_second: float
    """Over all ranks, end-of-text included."""
    data_wait_fraction: float
    """Share of `seconds` that rank 0 waited for its batches, 0 .. 1."""
    num_examples: int
    """Examples of this step, over all ranks."""
    seconds: float
    """Wall-clock time of this step on rank 0."""
    num_bad_samples: int = 0
    """Samples left out so far because they could not be read, over all ranks."""
    kind_losses: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """By subtype (and set of a mixture): sum of the loss over its answer tokens, and their number. Over all steps since
    the last record in what the monitor records, since a step may hold none of a subtype."""
    gpu: GpuReading | None = None
    """Filled in by the monitor where there is a GPU."""


_NESTED = ("kind_losses", "gpu")


def as_metrics(record: StepRecord) -> dict[str, int | float]:
    """The record as flat names and numbers; a loss for each kind of example that came up; GPU fields only
    where they were read."""
    metrics = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in _NESTED}
    metrics.update({f"loss/{name}": total / count for name, (total, count) in record.kind_losses.items() if count})
    if record.gpu is not None:
        metrics.update({name: value for name, value in dataclasses.asdict(record.gpu).items() if value is not None})
    return metrics
