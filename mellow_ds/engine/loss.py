"""The loss of an optimizer step: a sum over answer tokens divided by the global number of answer tokens.

Averages of averages would change the objective with the number of ranks, micro-batches or the lengths of answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mellow_ds.data.batch import IGNORE_INDEX, Batch


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

    A loss that is not finite may have gradients that are: an infinite cross entropy has. Its factor is made NaN, so
    that every gradient on every rank says that the step is to be skipped, without asking beforehand.
    """
    poison = loss_sum.detach() * 0  # 0, or NaN
    return loss_sum * (world_size / max(totals.num_answer_tokens, 1) + poison)


class LossSums:
    """Sums of the losses of answer tokens over the micro-batches of a step, in all and by kind of example."""

    def __init__(self, num_kinds: int, device: torch.device) -> None:
        self._totals = torch.zeros(1 + 2 * num_kinds, dtype=torch.float64, device=device)
        self._num_kinds = num_kinds

    def add(self, batch: Batch, loss_sum: torch.Tensor, row_losses: torch.Tensor | None) -> None:
        """Count a micro-batch: its loss sum [], and its rows' [B] where the batch has kinds."""
        self._totals[0] += loss_sum.detach()
        if batch.kinds is None or row_losses is None or not self._num_kinds:
            return
        counts = (batch.labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        self._totals[1 : 1 + self._num_kinds].index_add_(0, batch.kinds, row_losses.double())
        self._totals[1 + self._num_kinds :].index_add_(0, batch.kinds, counts.double())

    def over_all_ranks(self, totals: StepTotals) -> tuple[float, tuple[tuple[float, float], ...]]:
        """(mean loss of the step, by kind (loss sum, answer tokens)), the same on all ranks (a collective call)."""
        dist.all_reduce(self._totals)
        numbers = self._totals.tolist()
        sums, counts = numbers[1 : 1 + self._num_kinds], numbers[1 + self._num_kinds :]
        return numbers[0] / max(totals.num_answer_tokens, 1), tuple(zip(sums, counts, strict=True))
