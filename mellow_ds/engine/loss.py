"""The loss of an optimizer step: a sum over answer tokens divided by the global number of answer tokens.

Averages of averages would change the objective with the number of ranks, micro-batches or the lengths of answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mellow_ds.data.batch import Batch


@dataclass(frozen=True)
class StepTotals:
    """Counts of one optimizer step, over all ranks and micro-batches."""

    num_answer_tokens: int
    num_examples: int


def count_step(batches: Sequence[Batch], device: torch.device) -> StepTotals:
    """The totals of the step that these micro-batches are this rank's part of (a collective call)."""
    counts = torch.tensor(
        [sum(batch.num_answer_tokens for batch in batches), sum(batch.num_examples for batch in batches)],
        dtype=torch.int64,
        device=device,
    )
    dist.all_reduce(counts)
    return StepTotals(int(counts[0]), int(counts[1]))


def loss_for_backward(loss_sum: torch.Tensor, totals: StepTotals, world_size: int) -> torch.Tensor:
    """What to differentiate where the engine then averages gradients over `world_size` ranks.

    The average divides by the world, so the world is multiplied in; what is left is the sum over all answer tokens of
    the step divided by their number. A step without any answer token gives zero.
    """
    return loss_sum * (world_size / max(totals.num_answer_tokens, 1))


def global_mean_loss(loss_sum: torch.Tensor, totals: StepTotals) -> float:
    """The loss of the step, the same on all ranks, from each rank's detached sum (a collective call)."""
    total = loss_sum.detach().to(torch.float64, copy=True)
    dist.all_reduce(total)
    return float(total) / max(totals.num_answer_tokens, 1)
