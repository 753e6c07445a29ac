"""Engines of plain PyTorch for the checkpoint tests: whole tensors on every rank, no back end."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from mellow_ds.engine.owner import Keeper, copy_for, kept_at, kept_by, whole_place
from mellow_ds.engine.protocol import ParameterState, SavedParameter


class PlainEngine:
    """Trained weights of several sizes, a frozen one and buffers; every value follows from `value` and the name."""

    device = torch.device("cpu")

    def __init__(self, value: float, sizes: tuple[int, ...] = (12, 6, 4), scaler: dict[str, float] | None = None):
        self.value = value
        self.sizes = sizes
        self.scaler = scaler or {}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.loaded: dict[str, ParameterState] = {}

    def parameter_states(self) -> Iterator[ParameterState]:
        for number, size in enumerate(self.sizes):
            weight = torch.full((2, size // 2), float(self.value + number))
            moments = {"exp_avg": weight + 0.25, "exp_avg_sq": weight + 0.5}
            yield ParameterState(f"w{number}", weight, moments, 3 + number)

    def saved_parameters(self, keeper: Keeper) -> Iterator[SavedParameter]:
        for state in self.parameter_states():
            owner = keeper.owner(state.name)
            places = whole_place(owner, state.weight.numel(), dist.get_world_size() if dist.is_initialized() else 1)
            weight = kept_at(owner, self.rank, keeper, state.weight)
            own = {key: copy_for(keeper, moment.flatten()) for key, moment in state.moments.items()}
            yield SavedParameter(state.name, weight, own, places, state.num_updates)

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
