"""One optimizer step as every back end takes it: forward, backward, clip, update, and what to say of a skipped one.

A back end says only how a micro-batch goes forward and back, and how the weights are updated (`StepEngine`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mellow_ds.data.batch import Batch
from mellow_ds.engine.fault import RandomState, describe_fault
from mellow_ds.engine.loss import LossSums, count_step, loss_for_backward
from mellow_ds.engine.protocol import ParameterState, StepResult
from mellow_ds.engine.statistics import BatchNormStatistics
from mellow_ds.errors import CheckpointError


class StepEngine(ABC):
    """The part of an `Engine` that all back ends share."""

    device: torch.device
    gathers_weights: bool
    _model: nn.Module  # the bare model, whatever the back end wraps it in
    _precision: str  # one of `ds_config.choose_precision`
    _world_size: int
    _rank: int
    _rates: list[float]  # by parameter group: its learning rate over that of the schedule
    _group_parameters: list[list[nn.Parameter]]  # by parameter group, the model's own
    _group_updates: list[int]  # by parameter group: updates that its moments come from
    _statistics: BatchNormStatistics

    def train_step(
        self, batches: Sequence[Batch], learning_rate: float, max_grad_norm: float, num_kinds: int = 0
    ) -> StepResult:
        """See `Engine.train_step`."""
        for group, rate in zip(self._param_groups(), self._rates, strict=True):
            group["lr"] = learning_rate * rate
        random_state = RandomState(self.device)
        self._statistics.remember()
        totals = count_step(batches, self.device)
        sums = LossSums(num_kinds, self.device)
        for number, batch in enumerate(batches):
            self._begin_micro_batch(is_last=number == len(batches) - 1)
            batch = batch.to(self.device, non_blocking=True)
            output = self._forward(batch.model_inputs())
            sums.add(batch, output.loss_sum, output.row_losses)
            self._backward(loss_for_backward(output.loss_sum, totals, self._world_size))
        grad_norm = self._clip_and_step(max_grad_norm)
        skipped = not math.isfinite(grad_norm)
        loss, kind_losses = sums.over_all_ranks(totals)
        fault = ""
        if skipped:
            self._statistics.put_back()
            fault = self._describe_fault(batches, random_state)
            if not fault and (not math.isfinite(loss) or self._precision != "float16"):
                fault = "no module gives a value that is not finite when the step is run again"
        else:
            self._group_updates = [count + 1 for count in self._group_updates]
            self._statistics.average_over_ranks()
        return StepResult(loss, grad_norm, totals.num_answer_tokens, totals.num_examples, skipped, kind_losses, fault)

    def _describe_fault(self, batches: Sequence[Batch], random_state: RandomState) -> str:
        random_state.restore()
        fault = describe_fault(self._model, self._forward_again, batches, self.device, self._rank)
        self._statistics.put_back()
        return fault

    def _updates_by_parameter(self) -> dict[int, int]:
        """By id of a parameter."""
        counts = zip(self._group_updates, self._group_parameters, strict=True)
        return {id(parameter): count for count, group in counts for parameter in group}

    def _count_updates(self, counts: dict[int, int]) -> None:
        """Go on counting from `counts`, by id of a parameter; those of a group have been updated together."""
        self._group_updates = [max(counts.get(id(p), 0) for p in group) for group in self._group_parameters]

    @abstractmethod
    def _param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer at work, in the order of `_rates`."""

    @abstractmethod
    def _begin_micro_batch(self, is_last: bool) -> None:
        """Tell the back end whether the next forward and backward are the last of the step."""

    @abstractmethod
    def _forward(self, inputs: dict[str, Any]) -> Any:
        """Run the model through the back end's wrapper."""

    def _forward_again(self, inputs: dict[str, Any]) -> Any:
        """Run the model to look at it, with no update to follow."""
        return self._forward(inputs)

    @abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Differentiate; the back end averages gradients over the ranks."""

    @abstractmethod
    def _clip_and_step(self, max_grad_norm: float) -> float:
        """Clip, update the weights, forget the gradients; the norm before clipping, `inf` where nothing was updated."""


def check_moments(state: ParameterState, wanted: Sequence[str]) -> None:
    """Raise `CheckpointError` where a state is that of another optimizer than the one that is to go on with it."""
    if state.num_updates and set(state.moments) != set(wanted):
        raise CheckpointError(
            f"the checkpoint has {', '.join(sorted(state.moments))} of {state.name}, but this run's optimizer keeps "
            f"{', '.join(wanted)}: go on with the train.optimizer_type that it was saved with"
        )


def trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters that have a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def saved_buffers(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Buffers that a state dict holds: BatchNorm statistics, not what a module computes for itself."""
    saved = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def all_true(ok: bool, device: torch.device) -> bool:
    """Whether it holds on every rank (a collective call)."""
    flag = torch.tensor(int(ok), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def first_rank_where(it_holds: bool, device: torch.device) -> int:
    """The lowest rank on which it holds, or the world size (a collective call)."""
    first = torch.tensor(dist.get_rank() if it_holds else dist.get_world_size(), device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return int(first)
