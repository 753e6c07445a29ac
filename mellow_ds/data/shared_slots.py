"""Shared memory that loader processes pass the audio of batches through, again and again.

A tensor that a DataLoader passes on by itself lies in shared memory of its own, whose pages are new each time: for 6 MB
of samples that took ten times as long as reading them, where a virtual machine makes page faults dear. Slots are made
once. They have no name, so nothing is left of them when the processes end, however they end.
"""

import mmap
import os
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

_FREE, _FULL = 0, 1


@dataclass(frozen=True)
class Ticket:
    """Where a tensor lies that was put into a slot."""

    slot: int
    dtype: str  # numpy's name
    shape: tuple[int, ...]


class SharedSlots:
    """Slots of equal size, some for each loader process. Picklable for a process that is being started.

    A slot is filled by its loader process and emptied by the trainer, and by nobody else, so a byte that says which of
    the two may touch it is all the locking that is needed.
    """

    def __init__(self, num_workers: int, slots_each: int, slot_bytes: int) -> None:
        self._slots_each = slots_each
        self._slot_bytes = slot_bytes
        # the flags stand in a page of their own
        self._start = -(-num_workers * slots_each // mmap.PAGESIZE) * mmap.PAGESIZE
        self._descriptor = os.memfd_create("mellow-ds-slots")
        os.ftruncate(self._descriptor, self._start + num_workers * slots_each * slot_bytes)
        self._memory = mmap.mmap(self._descriptor, 0)

    @staticmethod
    def are_supported() -> bool:
        """Whether this system has memory without a name (Linux)."""
        return hasattr(os, "memfd_create")

    def put(self, worker: int, tensor: torch.Tensor) -> Ticket | None:
        """Copy a tensor into a free slot of this loader process; None where none is free or large enough."""
        array = tensor.numpy()
        if array.nbytes > self._slot_bytes:
            return None
        for slot in range(worker * self._slots_each, (worker + 1) * self._slots_each):
            if self._memory[slot] == _FREE:
                ticket = Ticket(slot, array.dtype.str, array.shape)
                self._view(ticket)[...] = array
                self._memory[slot] = _FULL
                return ticket
        return None

    def take(self, ticket: Ticket, pin: bool = False) -> torch.Tensor:
        """The tensor that a ticket stands for, in memory of its own (page-locked: `pin`); its slot is free again."""
        view = torch.from_numpy(self._view(ticket))
        tensor = view.pin_memory() if pin else view.clone()
        self._memory[ticket.slot] = _FREE
        return tensor

    def _view(self, ticket: Ticket) -> np.ndarray:
        count = int(np.prod(ticket.shape))
        offset = self._start + ticket.slot * self._slot_bytes
        flat = np.frombuffer(self._memory, dtype=ticket.dtype, count=count, offset=offset)
        return flat.reshape(ticket.shape)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_descriptor", "_memory")}
        return {**kept, "_descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = state["_descriptor"].detach()
        self._memory = mmap.mmap(self._descriptor, 0)

    def __del__(self) -> None:
        descriptor = self.__dict__.get("_descriptor")
        if isinstance(descriptor, int):
            os.close(descriptor)
