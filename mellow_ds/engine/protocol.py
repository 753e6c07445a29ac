"""What a back end does for the trainer. The trainer and the checkpoints know nothing else about it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mellow_ds.data.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on all ranks."""

    loss: float  # mean over the answer tokens of the step
    grad_norm: float  # global 2-norm before clipping
    num_answer_tokens: int
    num_examples: int
    skipped: bool  # float16: gradients overflowed, weights are unchanged
    kind_losses: tuple[tuple[float, float], ...] = ()  # by kind of example (`Batch.kinds`): loss sum, answer tokens


@dataclass(frozen=True)
class ParameterState:
    """A trained parameter with its optimizer state, whole and float32 on the CPU, however the engine splits it."""

    name: str
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]  # "exp_avg", "exp_avg_sq"; empty before the first step


class Engine(Protocol):
    """Trains a model on all ranks together."""

    name: str  # for the log, such as "DeepSpeed ZeRO-2 (torch fused AdamW, float32)"
    device: torch.device

    def train_step(
        self, batches: Sequence[Batch], learning_rate: float, max_grad_norm: float, num_kinds: int = 0
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches; every rank brings the same number.

        `max_grad_norm` 0 clips nothing. `num_kinds` > 0: report the loss by `Batch.kinds`, numbers below that.
        """
        ...

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """The model with all its weights on every rank, for evaluation; a collective call."""
        ...

    def parameter_states(self) -> Iterator[ParameterState]:
        """Every trained parameter in the order of `named_parameters`; a collective call, one parameter at a time."""
        ...

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """Take over what `parameter_states` gave, on any engine and world, after `num_updates` optimizer steps."""
        ...

    def fixed_state(self) -> dict[str, torch.Tensor]:
        """Frozen parameters and buffers by name, whole, on the CPU; a collective call."""
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
