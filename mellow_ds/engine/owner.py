"""What each rank brings to a save: a weight is gathered by one rank, which writes it; moments stay where they lie."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

Places = tuple[tuple[int, int], ...]
"""By rank, its part of a flat tensor: (where it begins, how many numbers it has)."""


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
    return partial(kept_at, keeper.owner(name), rank, keeper)


def kept_at(owner: int, rank: int, keeper: Keeper, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has whole: a copy on the CPU of `owner`, on the meta device elsewhere."""
    return copy_for(keeper, tensor) if rank == owner else shape_of(tensor)


def gathered_at(
    owner: int, keeper: Keeper, own: torch.Tensor, length: int, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """A tensor that is cut flat into parts, one a rank, of `length` numbers but for what lacks at the end: whole and
    float32 on the CPU of `owner`, and on the meta device elsewhere. A collective call: the others send it their parts.

    `own`: this rank's part; `device`: where the backend's collectives take tensors.
    """
    part = own.detach().flatten().to(device, torch.float32)
    if part.numel() < length:
        part = torch.nn.functional.pad(part, (0, length - part.numel()))
    if dist.get_rank() != owner:
        dist.gather(part.contiguous(), dst=owner)
        return torch.empty(shape, dtype=torch.float32, device="meta")
    num_ranks = dist.get_world_size()
    found = keeper.empty(torch.Size([num_ranks * length]), torch.float32)
    parts = found if device.type == "cpu" else torch.empty_like(found, device=device)
    dist.gather(part.contiguous(), list(parts.view(num_ranks, length)), dst=owner)
    if parts is not found:
        found.copy_(parts)
    return found[: math.prod(shape)].view(shape)


def copy_for(keeper: Keeper, tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the keeper's memory, floating-point numbers as float32."""
    return keeper.empty(tensor.shape, kept_dtype(tensor)).copy_(tensor.detach())


def even_places(length: int, num_numbers: int, num_ranks: int) -> Places:
    """Parts of `length` numbers, rank after rank, but for what lacks at the end."""
    starts = [min(rank * length, num_numbers) for rank in range(num_ranks)]
    return tuple((start, min(length, num_numbers - start)) for start in starts)


def whole_place(owner: int, num_numbers: int, num_ranks: int) -> Places:
    """All of it on `owner`."""
    return tuple((0, num_numbers if rank == owner else 0) for rank in range(num_ranks))


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, floating-point numbers as float32."""
    return tensor.detach().to("cpu", kept_dtype(tensor), copy=True).contiguous()


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in without memory, of the type that `to_cpu` would give."""
    return torch.empty(tensor.shape, dtype=kept_dtype(tensor), device="meta")


def kept_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Floating-point numbers are kept as float32."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
