"""Bytes that a rank hands to the network in an optimizer step, by formula, in ring terms.

A ring all-reduce of P numbers sends 2 P (N - 1) / N of them from each rank, a reduce (scatter) or an all-gather half of
that. P counts trained parameters, a micro-batches make up a step; numbers are sent in the compute format. Counted on
DeepSpeed 0.19.8 (tests/doctor/test_against_engines.py), in multiples of P (N - 1) / N:

| stage | turns | what |
| --- | --- | --- |
| 0 | 2 | all-reduce of gradients, once a step |
| 1 | 2 | reduce of gradients and all-gather of updated weights, once a step |
| 2 | a + 1 | the same, but gradients in each micro-batch |
| 3 | 3 a | in each micro-batch: all-gather of weights for the forward and for the backward pass, reduce of gradients |

With DeepSpeed's default `use_multi_rank_bucket_allreduce` stages 1 and 2 all-reduce gradients instead: 3 and 2 a + 1.
At stage 3 a model whose two passes stay below stage3_max_reuse_distance is gathered once a micro-batch: 2 a. A larger
one frees a tied embedding between its two uses in each pass: that is gathered twice more a micro-batch.
"""


def step_turns(stage: int, micro_batches: int = 1, all_reduces: bool = False, gathers: int = 2) -> int:
    """Times that every trained number goes halfway around the ring.

    `all_reduces`: use_multi_rank_bucket_allreduce is on; `gathers`: of the weights in a micro-batch at stage 3.
    """
    reduce = 2 if all_reduces else 1
    return {0: 2, 1: reduce + 1, 2: reduce * micro_batches + 1, 3: (gathers + 1) * micro_batches}[stage]


def step_bytes(
    stage: int,
    num_trained: int,
    world: int,
    number_bytes: int,
    micro_batches: int = 1,
    all_reduces: bool = False,
    gathers: int = 2,
    num_tied: int = 0,
) -> float:
    """What each rank sends in a step. `num_tied`: of the trained numbers, those used at both ends of the model."""
    sent = step_turns(stage, micro_batches, all_reduces, gathers) * num_trained
    if stage == 3 and gathers > 1:
        sent += 2 * micro_batches * num_tied
    return number_bytes * sent * (world - 1) / world


def fsdp_step_bytes(stage: int, num_trained: int, world: int, number_bytes: int, micro_batches: int = 1) -> float:
    """What each rank sends in a step of FSDP2 (stage 0: DDP), at most: what is outside the blocks is gathered once.

    Gradients are reduced in float32, weights gathered in the compute format.
    """
    gradient = 4.0
    by_stage = {
        0: 2 * gradient,
        1: gradient + number_bytes,
        2: micro_batches * (gradient + number_bytes),
        3: micro_batches * (gradient + 2 * number_bytes),
    }
    return by_stage[stage] * num_trained * (world - 1) / world
