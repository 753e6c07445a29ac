"""Tensors through slots between real processes: equal, reused, and without a name that could stay behind."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from mellow_ds.data.shared_slots import SharedSlots

pytestmark = pytest.mark.skipif(not SharedSlots.are_supported(), reason="no memfd_create on this system")


def numbered(number: int, size: int = 1000) -> torch.Tensor:
    return (torch.arange(size, dtype=torch.int16) + number).reshape(2, -1)


def fill(slots: SharedSlots, worker: int, tickets: Any, count: int) -> None:
    for number in range(count):
        ticket = None
        while ticket is None:  # until the other side has emptied one
            ticket = slots.put(worker, numbered(number))
        tickets.put(ticket)


@pytest.mark.slow
def test_tensors_come_out_as_they_were_and_slots_are_used_again() -> None:
    slots = SharedSlots(num_workers=2, slots_each=3, slot_bytes=2000)
    context = multiprocessing.get_context("forkserver")
    tickets = context.SimpleQueue()
    process = context.Process(target=fill, args=(slots, 1, tickets, 50))
    process.start()
    used = set()
    for number in range(50):
        ticket = tickets.get()
        used.add(ticket.slot)
        assert torch.equal(slots.take(ticket), numbered(number))
    process.join(30)
    assert process.exitcode == 0
    assert used <= {3, 4, 5}  # those of process 1


def test_what_does_not_fit_goes_another_way() -> None:
    slots = SharedSlots(1, 2, 100)
    assert slots.put(0, torch.zeros(51, dtype=torch.int16)) is None
    first, second = slots.put(0, torch.zeros(50, dtype=torch.int16)), slots.put(0, torch.ones(5))
    assert first is not None
    assert second is not None
    assert slots.put(0, torch.zeros(1)) is None  # both are full
    taken = slots.take(first)
    assert slots.put(0, torch.full((50,), 7, dtype=torch.int16)) is not None
    assert not taken.any()  # memory of its own
    assert torch.equal(slots.take(second), torch.ones(5))


def test_nothing_is_left_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(20):
        SharedSlots(2, 2, 1 << 20)
    after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
    assert after <= before
