"""One rank for each tensor: when a model is gathered to be saved, only the rank that writes a tensor keeps it."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Keeper(Protocol):
    """Says who keeps what, alike on all ranks, and where to."""

    def owner(self, name: str, held: Sequence[int] = ()) -> int:
        """The rank that keeps a tensor; `held`: how much of it each rank holds already, or nothing."""
        ...

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """CPU memory for a tensor that this rank keeps; not set."""
        ...


def kept_by(keeper: Keeper | None, name: str, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `rank` makes of a tensor that it has whole: a copy on the CPU, or, where another rank keeps it, only its
    shape and type (on the meta device). Without a keeper every rank keeps everything."""
    if keeper is None:
        return to_cpu
    if keeper.owner(name) != rank:
        return shape_of
    return lambda tensor: keeper.empty(tensor.shape, kept_dtype(tensor)).copy_(tensor.detach())


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, floating-point numbers as float32."""
    return tensor.detach().to("cpu", kept_dtype(tensor), copy=True).contiguous()


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in without memory, of the type that `to_cpu` would give."""
    return torch.empty(tensor.shape, dtype=kept_dtype(tensor), device="meta")


def kept_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Floating-point numbers are kept as float32."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
