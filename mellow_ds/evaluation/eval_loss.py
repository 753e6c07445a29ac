"""The loss on an evaluation set, over all ranks: what training lowers, measured on what it does not see."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from mellow_ds.world import World

if TYPE_CHECKING:
    from mellow_ds.data.batch import Batch


@dataclass(frozen=True)
class EvalLoss:
    """The same on all ranks, and for every world but for rounding."""

    loss: float  # mean over all answer tokens of the set
    num_answer_tokens: int
    num_examples: int


class LossBatches(Protocol):
    """One rank's batches with answers, as many on every rank (`mellow_ds.data.stream.EvalStream`)."""

    def __iter__(self) -> Iterator[tuple["Batch", Sequence[object]]]: ...

    def close(self) -> None:
        """End what loads them."""
        ...


def measure_loss(model: Any, batches: LossBatches, world: World, device: torch.device | str) -> EvalLoss:
    """Run `model` (evaluation mode, no gradients; its mode is put back) over this rank's batches; a collective call.

    Batches without examples are run too: a model whose ranks gather weights together needs the same number of passes.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, answer tokens, examples
    was_training = model.training
    model.eval()
    try:
        with contextlib.closing(batches), torch.no_grad():
            for batch, _ in batches:
                loss_sum = model(**batch.to(device, non_blocking=True).model_inputs()).loss_sum
                sums += torch.tensor(
                    [float(loss_sum), batch.num_answer_tokens, batch.num_examples], dtype=torch.float64, device=device
                )
    finally:
        model.train(was_training)
    if world.size > 1:
        dist.all_reduce(sums)
    loss, num_answer_tokens, num_examples = sums.tolist()
    return EvalLoss(loss / max(num_answer_tokens, 1), int(num_answer_tokens), int(num_examples))
