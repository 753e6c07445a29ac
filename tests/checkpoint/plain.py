"""Engines of plain PyTorch for the checkpoint tests: whole tensors on every rank, no back end."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from mellow_ds.engine.owner import Keeper, kept_by
from mellow_ds.engine.protocol import ParameterState


class PlainEngine:
    """Trained weights of several sizes, a frozen one and buffers; every value follows from `value` and the name."""

    device = torch.device("cpu")

    def __init__(self, value: float, sizes: tuple[int, ...] = (12, 6, 4), scaler: dict[str, float] | None = None):
        self.value = value
        self.sizes = sizes
        self.scaler = scaler or {}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.loaded: dict[str, ParameterState] = {}

    def parameter_states(self, keeper: Keeper | None = None) -> Iterator[ParameterState]:
        for number, size in enumerate(self.sizes):
            keep = kept_by(keeper, f"w{number}", self.rank)
            weight = torch.full((2, size // 2), float(self.value + number))
            moments = {"exp_avg": keep(weight + 0.25), "exp_avg_sq": keep(weight + 0.5)}
            yield ParameterState(f"w{number}", keep(weight), moments, 3 + number)

    def fixed_states(self, keeper: Keeper | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in (("frozen", torch.full((4,), -float(self.value))), ("buffer", torch.tensor(7))):
            yield name, kept_by(keeper, name, self.rank)(tensor)

    def load_parameter_states(self, states: Iterator[ParameterState]) -> None:
        self.loaded = {s.name: ParameterState(s.name, s.weight.clone(), s.moments, s.num_updates) for s in states}

    def scaler_state(self) -> dict[str, float]:
        return self.scaler

    def load_scaler_state(self, state: dict[str, float]) -> None:
        self.scaler = state


STATE = {"num_updates": 3, "progress": {"step": 3}}
