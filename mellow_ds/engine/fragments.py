"""The master weights and moments of ZeRO 1 and 2: flat, cut at any place, a fragment of a parameter here and there.

Most parameters lie whole on one rank, so a save that leaves each where it is sends next to nothing, where DeepSpeed's
`safe_get_full_fp32_param` sums a buffer of every parameter's size over all ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mellow_ds.engine.owner import Keeper, Places, shape_of


class Fragments:
    """Which part of each parameter every rank holds. Building it is a collective call.

    `_hp_mapping` is DeepSpeed 0.19's own record of a fragment on a parameter, None where this rank has none of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._rank, self._device = dist.get_rank(), device
        table = torch.zeros(len(parameters), dist.get_world_size(), 2, dtype=torch.int64)
        for number, parameter in enumerate(parameters):
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                address = mapping.lp_fragment_address
                table[number, self._rank] = torch.tensor([address.start, address.numel])
        table = table.to(device)
        dist.all_reduce(table)
        self._table: dict[int, list[list[int]]] = {
            id(parameter): rows for parameter, rows in zip(parameters, table.tolist(), strict=True)
        }

    def places(self, parameter: nn.Parameter) -> Places:
        """Where each rank's fragment lies in the flat parameter."""
        return tuple((start, length) for start, length in self._table[id(parameter)])

    def weight_at(self, owner: int, parameter: nn.Parameter, keeper: Keeper) -> torch.Tensor:
        """The float32 weight, whole on the CPU of rank `owner`, on the meta device elsewhere. Ranks that hold a part of
        it send that, so all make these calls in the same order."""
        rows = self._table[id(parameter)]
        own_start, own_length = rows[self._rank]
        own = own_fragment(parameter) if own_length else None
        if self._rank != owner:
            if own is not None:
                dist.send(own.to(self._device).contiguous(), owner)
            return shape_of(parameter)
        found = keeper.empty(torch.Size([parameter.numel()]), torch.float32)
        if own is not None:
            found[own_start : own_start + own_length].copy_(own)
        for rank, (start, length) in enumerate(rows):
            if rank != owner and length:
                part = torch.empty(length, dtype=torch.float32, device=self._device)
                dist.recv(part, rank)
                found[start : start + length].copy_(part)
        return found.view(parameter.shape)


def own_fragment(parameter: nn.Parameter, key: str | None = None) -> torch.Tensor:
    """This rank's fragment of the weight or a moment in float32, flat; of no numbers where it has none."""
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return torch.empty(0)
    fragment: torch.Tensor = mapping.get_hp_fragment(key)
    return fragment.detach().float().flatten()
