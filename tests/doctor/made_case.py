"""A case in which nothing is wrong, and changes to it: what the rules of the doctor are tested on."""

from dataclasses import replace
from typing import Any

from mellow_ds.config.load import load_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.doctor.facts import ActivationFacts, Case, Machine, ModelFacts, PartFacts, ShardFacts, TextFacts

MEGABYTE = 10**6
GIGABYTE = 10**9
ENGINE = {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}
ACTIVATIONS = ActivationFacts(
    layer_token_bytes=20_000, block_token_bytes=1_000, base_token_bytes=3_000, projector_clip_bytes=200_000,
    encoder_clip_bytes=0, answer_token_bytes=800_000,
)  # fmt: skip
MODEL = ModelFacts(
    parts=(
        PartFacts("encoder", 30 * MEGABYTE, 0),
        PartFacts("projector", 1 * MEGABYTE, 1 * MEGABYTE, num_trained_matrices=MEGABYTE // 2),
        PartFacts("decoder", 135 * MEGABYTE, 135 * MEGABYTE, num_trained_matrices=100 * MEGABYTE),
    ),
    num_layers=30, vocab_size=49_152, audio_tokens=33, max_positions=8192, has_position_table=False, is_tied=True,
    largest_parameter=28 * MEGABYTE, largest_block=3_500_000, has_batchnorm=True, activations=ACTIVATIONS,
)  # fmt: skip
SHARDS = ShardFacts(("a",), num_epoch_examples=64_000, shard_bytes=(200 * MEGABYTE,) * 100, num_clips=10_000)
TEXTS = TextFacts(
    num_sampled=1000, is_estimate=False, num_cut_prompts=0, num_cut_answers=0, longest_prompt=60, longest_answer=100,
    mean_row=120.0, longest_row=230, mean_answer=20.0, mean_clips=1.5,
)  # fmt: skip
GPUS = Machine(
    world=4, ranks_per_host=4, num_gpus=4, gpu_name="GPU", memory_bytes=80 * GIGABYTE,
    host_memory_bytes=500 * GIGABYTE, num_cores=64, free_disk_bytes=1000 * GIGABYTE,
    op_problems={"fused_adam": ""}, compiled_ops=frozenset({"fused_adam"}),
)  # fmt: skip
CPUS = replace(
    GPUS, num_gpus=0, gpu_name="", world=2, ranks_per_host=2, memory_bytes=250 * GIGABYTE, op_problems={},
    has_float16=False,
)  # fmt: skip


def configured(**overrides: Any) -> RunConfig:
    """The recipe for a GPU with these keys, written with __ for dots."""
    base = {
        "data.shards": "a", "train.batch_size": "16", "train.num_workers": "4",
        "model.encoder.use_pretrained_audioencoder": "true", "model.encoder.pretrained_audioencoder_path": "w",
    }  # fmt: skip
    return load_run_config("mellow-1gpu", {**base, **{k.replace("__", "."): str(v) for k, v in overrides.items()}})


def made_case(
    machine: Machine = GPUS, engine: dict[str, Any] | None = None, facts: dict[str, Any] | None = None, **overrides: Any
) -> Case:
    """Nothing is wrong but what is changed: `facts` replaces fields of the case, `overrides` keys of the run."""
    case = Case(configured(**overrides), ENGINE if engine is None else engine, machine, SHARDS, None, TEXTS, MODEL)
    return replace(case, **(facts or {}))
