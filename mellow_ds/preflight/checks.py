"""The collectives that training uses, each with values that are known beforehand.

Whole small numbers, exact in every number format: a wrong one is a fault of the network, of a library, or of memory.
What uses which: loss, statistics and flags all-reduce; DDP, FSDP2 and ZeRO all-reduce, reduce, reduce-scatter,
all-gather and broadcast; ZeRO's quantised gradients all-to-all; states cut by ZeRO send and receive; DeepSpeed compares
its arguments as objects.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mellow_ds.world import World

_SIZES = (1, 1003, 300_007)  # numbers a rank: NCCL sends small, middle and large messages in three ways
_ADDING_RANKS = 50  # with at most 4 each the sum stays exact in bfloat16 and below 256
_MODULUS = 5
_ALL_TYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8,
)  # fmt: skip
_GATHERED_TYPES = (torch.float32, torch.bfloat16, torch.uint8)
_UNSUPPORTED = ("nvalid scalar type", "nsupported data type", "nsupported scalar type", "not supported")


@dataclass(frozen=True)
class Wrong:
    """Values that a rank got and should not have."""

    rank: int
    collective: str
    num_wrong: int
    num_values: int
    first: str  # the first of them in words

    def __str__(self) -> str:
        return f"{self.collective}: {self.num_wrong} of {self.num_values} values are wrong, first {self.first}"


@dataclass(frozen=True)
class Check:
    """One collective with one number format and size."""

    name: str
    run: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]  # (found, expected) pairs


def run_check(check: Check, rank: int) -> Wrong | str | None:
    """None where all values are right; a string: why the back end has no such collective."""
    try:
        pairs = check.run()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if any(words in str(error) for words in _UNSUPPORTED):  # raised alike on all ranks, before anything is sent
            return str(error).splitlines()[0]
        raise
    for found, expected in pairs:
        found, expected = found.cpu(), expected.cpu()
        differs = (found != expected).reshape(-1)
        if bool(differs.any()):
            place = int(differs.nonzero()[0])
            first = (
                f"number {place}: {found.reshape(-1)[place].item():g} instead of {expected.reshape(-1)[place].item():g}"
            )
            return Wrong(rank, check.name, int(differs.sum()), found.numel(), first)
    return None


def checks(world: World, device: torch.device, backend: str) -> Iterator[Check]:
    """All of them, in the same order on every rank."""
    for size in _SIZES:
        for dtype in _ALL_TYPES:
            yield _all_reduce(world, device, dist.ReduceOp.SUM, "sum", dtype, size)
        for dtype in (torch.float32, torch.int64):
            yield _all_reduce(world, device, dist.ReduceOp.MAX, "max", dtype, size)
            yield _all_reduce(world, device, dist.ReduceOp.MIN, "min", dtype, size)
        if backend == "nccl":
            yield _all_reduce(world, device, dist.ReduceOp.AVG, "mean", torch.float32, size)
        for dtype in _GATHERED_TYPES:
            yield _all_gather(world, device, dtype, size)
            yield _all_gather_into_tensor(world, device, dtype, size)
        for dtype in (torch.float32, torch.bfloat16):
            yield _reduce_scatter(world, device, dtype, size)
        for root in _roots(world):
            yield _reduce(world, device, root, size)
            yield _broadcast(world, device, root, size)
        yield _all_to_all(world, device, size)
        if world.size > 1:
            yield _around_the_ring(world, device, size)
    yield _objects(world)


def _roots(world: World) -> list[int]:
    """All ranks of a small world, else a few of them."""
    return sorted({0, world.size // 2, world.size - 1, *range(min(world.size, 4))})


def values(rank: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What rank `rank` brings, [size]."""
    return ((torch.arange(size, device=device) + 3 * rank) % _MODULUS).to(dtype)


def _added(rank: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What it adds to a sum, [size]: nothing from ranks that would make it inexact."""
    own = values(rank, size, dtype, device)
    return own if rank < _ADDING_RANKS else torch.zeros_like(own)


def _sum(world: World, size: int, device: torch.device) -> torch.Tensor:
    """Of what all ranks add, [size] int64, without a collective."""
    adding = range(min(world.size, _ADDING_RANKS))
    return sum((_added(rank, size, torch.int64, device) for rank in adding), torch.zeros(size, device=device).long())


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _all_reduce(
    world: World, device: torch.device, op: dist.ReduceOp.RedOpType, word: str, dtype: torch.dtype, size: int
) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = _added(world.rank, size, dtype, device)
        dist.all_reduce(found, op=op)
        total = _sum(world, size, device)
        if word in ("max", "min"):
            every = torch.stack([_added(rank, size, dtype, device) for rank in range(world.size)])
            return [(found, every.amax(0) if word == "max" else every.amin(0))]
        return [(found, total.to(dtype) if word == "sum" else (total.double() / world.size).to(dtype))]

    return Check(f"all_reduce {word} of {size} {_type(dtype)}", run)


def _all_gather(world: World, device: torch.device, dtype: torch.dtype, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = values(world.rank, size, dtype, device)
        found = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(found, own)
        return [(one, values(rank, size, dtype, device)) for rank, one in enumerate(found)]

    return Check(f"all_gather of {size} {_type(dtype)}", run)


def _all_gather_into_tensor(world: World, device: torch.device, dtype: torch.dtype, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = values(world.rank, size, dtype, device)
        found = torch.empty(world.size * size, dtype=dtype, device=device)
        dist.all_gather_into_tensor(found, own)
        return [(found, torch.cat([values(rank, size, dtype, device) for rank in range(world.size)]))]

    return Check(f"all_gather_into_tensor of {size} {_type(dtype)}", run)


def _reduce_scatter(world: World, device: torch.device, dtype: torch.dtype, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        whole = _added(world.rank, world.size * size, dtype, device)
        found = torch.empty(size, dtype=dtype, device=device)
        dist.reduce_scatter_tensor(found, whole)
        own = slice(world.rank * size, (world.rank + 1) * size)
        return [(found, _sum(world, world.size * size, device)[own].to(dtype))]

    return Check(f"reduce_scatter_tensor of {size} {_type(dtype)}", run)


def _reduce(world: World, device: torch.device, root: int, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = _added(world.rank, size, torch.float32, device)
        dist.reduce(found, dst=root)
        return [(found, _sum(world, size, device).float())] if world.rank == root else []

    return Check(f"reduce to rank {root} of {size} float32", run)


def _broadcast(world: World, device: torch.device, root: int, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = values(world.rank, size, torch.int64, device)
        dist.broadcast(found, src=root)
        return [(found, values(root, size, torch.int64, device))]

    return Check(f"broadcast from rank {root} of {size} int64", run)


def _all_to_all(world: World, device: torch.device, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = values(world.rank, world.size * size, torch.float32, device)
        found = torch.empty_like(own)
        dist.all_to_all_single(found, own)
        part = slice(world.rank * size, (world.rank + 1) * size)
        sent = [values(rank, world.size * size, torch.float32, device)[part] for rank in range(world.size)]
        return [(found, torch.cat(sent))]

    return Check(f"all_to_all_single of {size} float32", run)


def _around_the_ring(world: World, device: torch.device, size: int) -> Check:
    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
        found = torch.empty(size, dtype=torch.float32, device=device)
        own = values(world.rank, size, torch.float32, device)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, found, before)]):
            work.wait()
        return [(found, values(before, size, torch.float32, device))]

    return Check(f"send and receive around the ring of {size} float32", run)


def _objects(world: World) -> Check:
    """Pickled by torch between the ranks of this very check."""

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found: list[object] = [None] * world.size
        dist.all_gather_object(found, {"rank": world.rank})
        listed: list[object] = [f"of rank {world.rank}"]
        dist.broadcast_object_list(listed, src=0)
        is_right = found == [{"rank": rank} for rank in range(world.size)] and listed == ["of rank 0"]
        return [(torch.tensor(is_right), torch.tensor(True))]

    return Check("all_gather_object and broadcast_object_list", run)
