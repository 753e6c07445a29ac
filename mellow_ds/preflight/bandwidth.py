"""How fast collectives are between these ranks, by size; and which link or rank is slower than the others.

Bandwidths as nccl-tests defines them (its doc/PERFORMANCE.md): algorithm bandwidth is size over time; bus bandwidth is
that times what each rank sends for a byte of it, and can be held against that of the hardware whatever the number of
ranks. Size: bytes of the whole buffer, of an all-gather the gathered one, of a reduce-scatter the one that is
scattered. Time: of the slowest rank, mean of many calls.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mellow_ds.world import World

_WARM_UPS = 2
_MOST_CALLS = 200
_FEWEST_CALLS = 3
_LINK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_LINK_CALLS = 5
_LOCAL_BYTES = 32 << 20


@dataclass(frozen=True)
class Measured:
    """A collective at a size."""

    collective: str
    num_bytes: int
    seconds: float
    bus_factor: float

    @property
    def algorithm_gigabytes(self) -> float:
        """Gigabytes a second, 10^9 as in nccl-tests."""
        return self.num_bytes / self.seconds / 1e9

    @property
    def bus_gigabytes(self) -> float:
        """Gigabytes a second, to be held against the hardware."""
        return self.algorithm_gigabytes * self.bus_factor


@dataclass(frozen=True)
class Link:
    """Between the first ranks of two hosts."""

    one: str
    other: str
    latency_seconds: float  # half of a round trip of 4 bytes
    gigabytes: float  # a second, one way


def bus_factor(collective: str, world_size: int) -> float:
    """What a rank sends for each byte of the size (nccl-tests, doc/PERFORMANCE.md)."""
    part = (world_size - 1) / world_size
    return {"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part, "all_to_all": part}.get(collective, 1.0)


def measure(
    world: World, device: torch.device, sizes: Sequence[int], seconds: float, at: Callable[[str], None]
) -> list[Measured]:
    """Every collective at every size (bytes, rounded up to whole numbers a rank), about `seconds` each."""
    found = []
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"):
        for size in sizes:
            at(f"measuring {collective} of {size} bytes")
            numbers = -(-size // 4 // world.size) * world.size or world.size
            call = _call(collective, numbers, world, device)
            mean = _mean_seconds(call, device, seconds)
            found.append(Measured(collective, 4 * numbers, mean, bus_factor(collective, world.size)))
    return found


def _call(collective: str, numbers: int, world: World, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(numbers, device=device)
    part = torch.zeros(numbers // world.size, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "broadcast": lambda: dist.broadcast(whole, src=0),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    return calls[collective]


def _mean_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call on the slowest rank."""
    for _ in range(_WARM_UPS):
        call()
    once = _slowest(_timed(call, 1, device), device)
    number = int(min(max(seconds / max(once, 1e-9), _FEWEST_CALLS), _MOST_CALLS))  # the same on all ranks
    return _slowest(_timed(call, number, device), device)


def _timed(call: Callable[[], object], number: int, device: torch.device) -> float:
    """Seconds of a call here, begun together."""
    _wait(device)
    dist.barrier()
    _wait(device)
    began = time.perf_counter()
    for _ in range(number):
        call()
    _wait(device)
    return (time.perf_counter() - began) / number


def _slowest(seconds: float, device: torch.device) -> float:
    most = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def measure_links(
    world: World, device: torch.device, leaders: Sequence[int], names: Sequence[str], at: Callable[[str], None]
) -> list[Link]:
    """From each host to the next, one after another; `leaders`: a rank of each host, `names`: of the hosts."""
    pairs = list(zip(leaders, (*leaders[1:], leaders[0]), strict=True)) if len(leaders) > 2 else [tuple(leaders[:2])]
    found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    for place, (one, other) in enumerate(pairs):
        at(f"the link between rank {one} and rank {other}")
        if world.rank in (one, other):
            peer = other if world.rank == one else one
            latency = _there_and_back(world.rank == one, peer, 4, device)
            large = _there_and_back(world.rank == one, peer, _LINK_BYTES[device.type], device)
            if world.rank == one:
                found[place] = torch.tensor([latency, _LINK_BYTES[device.type] / large / 1e9])
        dist.barrier()
    dist.all_reduce(found)  # one rank has put in each row
    name = dict(zip(leaders, names, strict=True))
    return [Link(name[one], name[other], *row) for (one, other), row in zip(pairs, found.tolist(), strict=True)]


def _there_and_back(begins: bool, peer: int, num_bytes: int, device: torch.device) -> float:
    """Seconds of one way: half of the quickest round trip."""
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    quickest = float("inf")
    for _ in range(_LINK_CALLS):
        _wait(device)
        began = time.perf_counter()
        for sends in (begins, not begins):
            dist.send(message, peer) if sends else dist.recv(message, peer)
        _wait(device)
        quickest = min(quickest, time.perf_counter() - began)
    return quickest / 2


def measure_ranks(world: World, device: torch.device) -> list[float]:
    """Gigabytes a second that each rank adds up by itself: memory and processor, no network."""
    own = torch.zeros(_LOCAL_BYTES // 4, device=device)
    quickest = float("inf")
    for _ in range(_LINK_CALLS):
        _wait(device)
        began = time.perf_counter()
        own.add_(1.0)
        _wait(device)
        quickest = min(quickest, time.perf_counter() - began)
    rates = torch.zeros(world.size, dtype=torch.float64, device=device)
    rates[world.rank] = 2 * _LOCAL_BYTES / quickest / 1e9  # read and written
    dist.all_reduce(rates)
    return [float(rate) for rate in rates.tolist()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
