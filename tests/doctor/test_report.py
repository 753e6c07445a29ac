"""The arithmetic below the findings: bytes that a rank sends, against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from mellow_ds.doctor.report import summary
from tests.doctor.made_case import GPUS, made_case

# of the made case: 136 million trained numbers, 28 of them at both ends, 4 ranks, bfloat16: a turn is 204 MB a rank
REUSE = {"stage": 3, "stage3_max_reuse_distance": 0}


@pytest.mark.parametrize(
    ("zero", "engine", "sent"),
    [
        ({"stage": 0}, "deepspeed", "408 MB"),  # 2 turns
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, "deepspeed", "408 MB"),
        ({"stage": 2}, "deepspeed", "612 MB"),  # DeepSpeed's default all-reduces gradients
        ({"stage": 3}, "deepspeed", "408 MB"),  # the model stays gathered from one pass to the next
        (REUSE, "deepspeed", "696 MB"),  # 3 turns, and the embedding 2 more: 0.75 x 2 x 2 x 28
        ({"stage": 0}, "fsdp", "816 MB"),  # DDP, in float32
        ({"stage": 3}, "fsdp", "816 MB"),  # 4 and twice 2 bytes a number
    ],
)
def test_what_a_rank_sends_in_a_step(zero: dict[str, Any], engine: str, sent: str) -> None:
    case = made_case(engine={"zero_optimization": zero})
    rows = dict(summary(replace(case, config=replace(case.config, engine=engine))))
    assert rows["sent a rank and step"] == f"{sent} at most (docs/communication.md)"


def test_one_rank_sends_nothing() -> None:
    alone = replace(GPUS, world=1, ranks_per_host=1, num_gpus=1)
    assert "sent a rank and step" not in dict(summary(made_case(alone)))
