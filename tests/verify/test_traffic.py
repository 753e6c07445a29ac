"""Bytes handed to collectives: the recorder against collectives made by hand, the engines against the formula."""

import pytest
import torch
import torch.distributed as dist

from mellow_ds.verify.processes import run_ranks
from mellow_ds.verify.traffic import (
    Sizes,
    TrafficCase,
    TrafficRecorder,
    Transfer,
    expected_bytes,
    measure,
)
from mellow_ds.world import World


def collect_by_hand(world: World) -> list[tuple[str, str, int]]:
    """Six collectives of 12 numbers each, in all the ways that back ends call them."""
    whole, part = torch.zeros(12), torch.zeros(12 // world.size)
    with TrafficRecorder() as recorder:
        dist.all_reduce(whole)
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather([torch.zeros(4) for _ in range(world.size)], torch.zeros(4))
        dist.reduce_scatter_tensor(part, whole)
        dist.broadcast(whole.half(), src=0)
        dist.reduce(whole.double(), dst=1)
        dist.barrier()
    return [(t.kind, t.dtype, t.num_bytes) for t in recorder.transfers]


def test_the_recorder_sees_each_collective_whole() -> None:
    found = run_ranks(3, collect_by_hand)
    assert found[0] == found[1] == found[2]
    assert found[0] == [
        ("allreduce", "float32", 48), ("allgather", "float32", 48), ("allgather", "float32", 16),
        ("allgather", "float32", 16), ("allgather", "float32", 16), ("reduce_scatter", "float32", 48),
        ("broadcast", "float16", 24), ("reduce", "float64", 96),
    ]  # fmt: skip
    assert Transfer("allreduce", "float32", 48).ring_bytes(3) == 64
    assert Transfer("reduce", "float64", 96).ring_bytes(3) == 64


def test_the_formula_by_hand() -> None:
    """Of the issue: 2P(N-1)/N for stages 0 to 2 without accumulation, 3P(N-1)/N for stage 3."""
    sizes = Sizes(trained=1000, root=0, frozen=500)
    for kind in ("deepspeed", "fsdp"):
        turns = [expected_bytes(TrafficCase("", kind, stage), sizes, 4) / (4 * 1000 * 3 / 4) for stage in range(4)]
        assert turns == [2, 2, 2, 3]
    tied = Sizes(trained=1000, root=0, frozen=0, tied=100)
    assert expected_bytes(TrafficCase("", "deepspeed", 3), tied, 2) == (3000 + 200) * 4 / 2
    assert expected_bytes(TrafficCase("", "deepspeed", 3, gathers=1), tied, 2) == 2000 * 4 / 2
    twice = TrafficCase("", "deepspeed", 2, accumulation=2)
    assert expected_bytes(twice, sizes, 2) == 3 * 4000 / 2
    half = TrafficCase("", "fsdp", 3, precision="bfloat16")
    assert expected_bytes(half, sizes, 2) == (2 * 2000 + 4000) / 2
    sharded = TrafficCase("", "fsdp", 3, frozen_whole_megabytes=0)
    assert expected_bytes(sharded, sizes, 2) == (3 * 4000 + 2000) / 2
    first = TrafficCase("", "fsdp", 1, frozen_whole_megabytes=0, accumulation=3)
    assert expected_bytes(first, sizes, 2) == (2 * 4000 + 2000) / 2
    whole = TrafficCase("", "deepspeed", 2, frozen_whole_megabytes=0)
    assert expected_bytes(whole, sizes, 2) == 2 * 4000 / 2


LIKE_LARGE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
CASES = [
    TrafficCase("ZeRO-2", "deepspeed", 2, {"use_multi_rank_bucket_allreduce": False}, accumulation=2),
    TrafficCase("ZeRO-3", "deepspeed", 3, LIKE_LARGE),
    TrafficCase("DDP", "fsdp", 0, accumulation=2),
    TrafficCase("FSDP2 stage 3", "fsdp", 3),
    TrafficCase("FSDP2 stage 2, bfloat16", "fsdp", 2, precision="bfloat16"),
    TrafficCase("FSDP2 stage 1, frozen sharded", "fsdp", 1, frozen_whole_megabytes=0, accumulation=2),
    TrafficCase("ZeRO-1, frozen not whole", "deepspeed", 1, all_reduces=True, frozen_whole_megabytes=0),
    TrafficCase("FSDP2 stage 3, frozen sharded", "fsdp", 3, frozen_whole_megabytes=0, accumulation=2),
]


@pytest.mark.slow
def test_engines_send_what_the_formula_says_and_nothing_of_a_frozen_encoder() -> None:
    """The encoder is two fifths of the numbers; in the last case it is sharded, and each of its blocks gathered once a
    micro-batch (FSDP2 by itself gathers the last one once more, for a backward pass that it has not)."""
    for case, found in zip(CASES, run_ranks(2, measure, CASES, 96, (16, 96))[0], strict=True):
        assert found.difference == pytest.approx(0, abs=0.02), (case.name, found)
        if case.precision == "bfloat16":  # computed so, summed in float32
            assert {name for name, size in found.by_kind.items() if size > 10_000} == {
                "allgather bfloat16", "reduce_scatter float32",
            }  # fmt: skip
