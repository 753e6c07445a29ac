"""What a back end does for the trainer. The trainer and the checkpoints know nothing else about it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mellow_ds.data.batch import Batch
from mellow_ds.engine.owner import Keeper, Places


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on all ranks."""

    loss: float  # mean over the answer tokens of the step
    grad_norm: float  # global 2-norm before clipping
    num_answer_tokens: int
    num_examples: int
    skipped: bool  # a loss or gradient was not finite: weights are unchanged
    kind_losses: tuple[tuple[float, float], ...] = ()  # by kind of example (`Batch.kinds`): loss sum, answer tokens
    fault: str = ""  # of a skipped step: rank, examples and first bad module, in a line; empty: float16 scaled too high


@dataclass(frozen=True)
class ParameterState:
    """A trained parameter with its optimizer state, whole and float32 on the CPU, however the engine splits it."""

    name: str
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]  # such as "exp_avg", "exp_avg_sq"; empty before the first update
    num_updates: int = 0  # optimizer steps that the moments come from; parts that were frozen for a while have fewer


@dataclass(frozen=True)
class SavedParameter:
    """What a rank brings of a trained parameter to a save, copied to CPU memory."""

    name: str
    weight: torch.Tensor  # whole and float32 where the keeper says so, a shape on the meta device elsewhere
    moments: dict[str, torch.Tensor]  # this rank's part of each, flat and float32, maybe of no numbers
    places: Places  # of everybody's parts
    num_updates: int = 0  # see `ParameterState`


class Engine(Protocol):
    """Trains a model on all ranks together."""

    name: str  # for the log, such as "DeepSpeed ZeRO-2 (torch fused AdamW, float32)"
    device: torch.device
    gathers_weights: bool  # a block at a time, in each pass through the model: ZeRO-3, and FSDP2 at stage 3

    def train_step(
        self, batches: Sequence[Batch], learning_rate: float, max_grad_norm: float, num_kinds: int = 0
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches; every rank brings the same number.

        `learning_rate` is that of the schedule; parts with a rate of their own keep their ratio to it.
        `max_grad_norm` 0 clips nothing. `num_kinds` > 0: report the loss by `Batch.kinds`, numbers below that.
        """
        ...

    def model_in_step(self) -> AbstractContextManager[nn.Module]:
        """The model as it is split, for passes without gradients that all ranks make together, each as many.

        A collective call. A rank holds no more than in training.
        """
        ...

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """The model with all its weights on every rank, which then makes passes as it likes; a collective call."""
        ...

    def parameter_states(self) -> Iterator[ParameterState]:
        """Every trained parameter in the order of `named_parameters`, whole; a collective call, one at a time."""
        ...

    def saved_parameters(self, keeper: Keeper) -> Iterator[SavedParameter]:
        """Every trained parameter in the order of `named_parameters`, as it is saved; a collective call, one at a time.

        A weight goes to the rank that `keeper` names; of the moments nothing is sent.
        """
        ...

    def load_parameter_states(self, states: Iterator[ParameterState]) -> None:
        """Take over what `parameter_states` gave, on any engine and world.

        States of parameters that are frozen now are passed over; trained ones without a state start from nothing.
        """
        ...

    def fixed_states(self, keeper: Keeper | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Frozen parameters and saved buffers by name, whole, copied to the CPU; a collective call, one at a time.

        With `keeper` only the rank that it names keeps one; elsewhere there are shapes on the meta device.
        """
        ...

    def scaler_state(self) -> dict[str, float]:
        """State of dynamic loss scaling; empty without it."""
        ...

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """The inverse of `scaler_state`."""
        ...

    def close(self) -> None:
        """Release what the engine holds; the process group stays."""
        ...
