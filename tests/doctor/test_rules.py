"""Every finding is provoked by a case in which that one thing is wrong, and by nothing in a case that is right."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mellow_ds.doctor.examine
from mellow_ds.doctor.examine import examine
from mellow_ds.doctor.facts import Case, Machine, PartFacts
from mellow_ds.doctor.findings import NOTE, SEVERITIES, SLOW, STOPS
from mellow_ds.ds_config import read_engine_json
from tests.doctor.made_case import ACTIVATIONS, CPUS, ENGINE, GIGABYTE, GPUS, MEGABYTE, MODEL, SHARDS, TEXTS, made_case

ENGINE_FILES = Path(__file__).resolve().parent.parent.parent / "ds_configs"
ROOM = Path(mellow_ds.doctor.examine.__file__).parent
GATHERED = {"refused", "packed-first", "no-shards", "sizes-unknown", "texts-not-read"}  # in test_doctor_command.py


def zero(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {**ENGINE["zero_optimization"], **changes}}


def fp16(**section: Any) -> dict[str, Any]:
    return {**ENGINE, "fp16": {"enabled": True, **section}}


def trained(part: str, is_trained: bool, **changes: Any) -> dict[str, Any]:
    """The model with another part trained or frozen."""
    parts = tuple(
        replace(p, num_trained=p.num_parameters if is_trained else 0) if p.name == part else p for p in MODEL.parts
    )
    return {"model": replace(MODEL, parts=parts, **changes)}


def remote(num_shards: int, each: int, **changes: Any) -> dict[str, Any]:
    sizes = (each,) * num_shards
    return {"shards": replace(SHARDS, shard_bytes=sizes, remote_bytes=sum(sizes), **changes)}


def gpus(**changes: Any) -> Machine:
    return replace(GPUS, **changes)


NVME = {"device": "nvme", "nvme_path": "."}
FROZEN_MODEL = {"model": replace(MODEL, parts=tuple(PartFacts(p.name, p.num_parameters, 0) for p in MODEL.parts))}
HUGE_MODEL = {
    "model": replace(
        MODEL,
        parts=(MODEL.parts[0], MODEL.parts[1], PartFacts("decoder", 2000 * MEGABYTE, 2000 * MEGABYTE)),
        largest_block=50 * MEGABYTE,
    )
}
# code -> (severity, case)
PROVOKED: dict[str, tuple[str, Case]] = {
    "batch-below-world": (STOPS, made_case(train__global_batch_size=3)),
    "batch-does-not-fill": (SLOW, made_case(train__global_batch_size=72)),
    "batch-uneven": (NOTE, made_case(train__global_batch_size=127)),
    "micro-batch-small": (SLOW, made_case(train__batch_size=2, train__global_batch_size=16)),
    "engine-json": (STOPS, made_case(engine={**ENGINE, "gradient_clipping": 3.0})),
    "epoch-below-batch": (SLOW, made_case(facts={"shards": replace(SHARDS, num_epoch_examples=63)})),
    "last-batch-partial": (NOTE, made_case(facts={"shards": replace(SHARDS, num_epoch_examples=64_003)})),
    "no-float16": (STOPS, made_case(CPUS, engine=fp16(min_loss_scale=1))),
    "no-bfloat16": (STOPS, made_case(gpus(has_bfloat16=False))),
    "bfloat16-on-cpu": (SLOW, made_case(CPUS, engine={**ENGINE, "bf16": {"enabled": True}})),
    "float32-on-gpu": (SLOW, made_case(train__mixed_precision__use_mixed_precision="false")),
    "loss-scale-static": (SLOW, made_case(engine=fp16(loss_scale=128))),
    "loss-scale-floor": (STOPS, made_case(engine=fp16(min_loss_scale=0))),
    "float16-at-stage-0": (STOPS, made_case(engine={**fp16(min_loss_scale=1), **zero(stage=0)})),
    "loss-scale-start": (SLOW, made_case(engine=fp16(min_loss_scale=1, initial_scale_power=32))),
    "float16-where-bfloat16": (NOTE, made_case(engine=fp16(min_loss_scale=1))),
    "phase-never": (NOTE, made_case(train__phases="[{from_step: 0, train: [projector]}, {from_step: 10000, "
                                    "train: [projector, decoder]}]")),
    "warmup-beyond-run": (STOPS, made_case(train__warmup_steps=10_000)),
    "warmup-long": (SLOW, made_case(train__warmup_steps=5_000)),
    "saves-only-at-end": (SLOW, made_case(train__save_every_steps=10_000)),
    "saves-often": (SLOW, made_case(train__save_every_steps=5)),
    "evaluation-never": (NOTE, made_case(train__evaluate_every_steps=10_001, data__eval_shards="b")),
    "schedule-never-turns": (NOTE, made_case(train__scheduler="step", train__decay_steps=10_001)),
    "memory-too-small": (STOPS, made_case(gpus(memory_bytes=4 * GIGABYTE))),
    "memory-tight": (SLOW, made_case(gpus(memory_bytes=7_050 * MEGABYTE))),
    "host-memory-too-small": (
        STOPS, made_case(gpus(host_memory_bytes=GIGABYTE), engine=zero(offload_optimizer={"device": "cpu"})),
    ),
    "offload-not-needed": (SLOW, made_case(engine=zero(offload_optimizer={"device": "cpu"}))),
    "stage-too-high": (SLOW, made_case(engine=zero(stage=3))),
    "bucket-beyond-model": (NOTE, made_case(gpus(memory_bytes=16 * GIGABYTE))),
    "fewer-shards-than-readers": (NOTE, made_case(facts={"shards": replace(SHARDS, shard_bytes=(MEGABYTE,) * 15)})),
    "window-holds-all": (NOTE, made_case(facts={"shards": replace(SHARDS, shard_bytes=(MEGABYTE,) * 16)},
                                         data__shuffle_window=16)),
    "remote-shard-large": (SLOW, made_case(facts=remote(20, 3 * GIGABYTE), data__cache_gigabytes=100)),
    "cache-below-shard": (STOPS, made_case(facts=remote(20, GIGABYTE), data__cache_gigabytes=0.5)),
    "cache-small": (SLOW, made_case(facts=remote(100, GIGABYTE), data__cache_gigabytes=20)),
    "no-eval-shards": (STOPS, made_case(train__evaluate_at_end="true")),
    "workers-beyond-cores": (SLOW, made_case(gpus(num_cores=8))),
    "no-workers": (SLOW, made_case(train__num_workers=0)),
    "prompts-cut": (SLOW, made_case(facts={"texts": replace(TEXTS, num_cut_prompts=3, longest_prompt=140)})),
    "answers-cut": (SLOW, made_case(facts={"texts": replace(TEXTS, num_cut_answers=3, longest_answer=300)})),
    "prompt-padding": (SLOW, made_case(facts={"texts": replace(TEXTS, longest_prompt=20)}, model__layout="mellow",
                                       model__encoder__audio_tokens=129)),
    "row-beyond-positions": (
        STOPS, made_case(facts={"texts": replace(TEXTS, longest_row=1100),
                                "model": replace(MODEL, max_positions=1024, has_position_table=True)}),
    ),
    "row-may-pass-positions": (
        NOTE, made_case(facts={"model": replace(MODEL, max_positions=400, has_position_table=True)}),
    ),
    "features-with-trained-encoder": (
        STOPS, made_case(facts={"shards": replace(SHARDS, has_features=True)},
                         train__phases="[{from_step: 0, train: [projector]}, {from_step: 9, train: [encoder]}]"),
    ),
    "untrained-encoder": (SLOW, made_case(model__encoder__use_pretrained_audioencoder="false")),
    "lamb-needs-whole-layers": (STOPS, made_case(train__optimizer_type="Lamb")),
    "lamb-replaced": (SLOW, made_case(CPUS, engine=zero(stage=0), train__optimizer_type="Lamb")),
    "muon-needs-whole-matrices": (STOPS, made_case(train__optimizer_type="Muon")),
    "evaluation-gathers": (SLOW, made_case(engine=zero(stage=3), train__evaluate_at_end="true")),
    "evaluation-too-large": (
        STOPS, made_case(gpus(memory_bytes=16 * GIGABYTE), engine=zero(stage=3), facts=HUGE_MODEL,
                         train__evaluate_at_end="true", evaluation__gather_weights="true"),
    ),
    "muon-not-clipped": (NOTE, made_case(train__optimizer_type="Muon")),
    "nothing-trained": (STOPS, made_case(facts=FROZEN_MODEL)),
    "tied-under-stage-3": (NOTE, made_case(engine=zero(stage=3), facts=HUGE_MODEL)),
    "adapter-on-tied-head": (
        STOPS, made_case(model__decoder__lora__rank=8, model__decoder__lora__target_modules="[q_proj, lm_head]"),
    ),
    "batchnorm-by-rank": (NOTE, made_case(facts=trained("encoder", True), train__sync_batchnorm="false")),
    "rate-of-frozen-part": (NOTE, made_case(train__learning_rates__encoder="1e-4")),
    "no-deepspeed": (STOPS, made_case(gpus(deepspeed_problem="No module named 'deepspeed'"))),
    "fsdp-takes-over": (NOTE, made_case(gpus(deepspeed_problem="No module named 'deepspeed'"))),
    "nvme-without-deepspeed": (STOPS, made_case(engine=zero(stage=3, offload_param=NVME))),
    "nvme-folder": (STOPS, made_case(engine=zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/no/disk"}))),
    "offload-at-stage-0": (SLOW, made_case(engine=zero(stage=0, offload_optimizer={"device": "cpu"}))),
    "offload-param-below-3": (SLOW, made_case(engine=zero(offload_param={"device": "cpu"}))),
    "nvme-buffer-small": (STOPS, made_case(engine=zero(stage=3, offload_param={**NVME, "buffer_size": 1000}))),
    "stale-lock": (STOPS, made_case(gpus(stale_locks=("a lock",)))),
    "op-async_io": (
        STOPS, made_case(gpus(op_problems={"async_io": "libaio is missing: install it"}),
                         engine=zero(stage=3, offload_param=NVME)),
    ),
    "op-fused_adam": (SLOW, made_case(gpus(op_problems={"fused_adam": "no nvcc: install it"}))),
    "compiles-first": (NOTE, made_case(gpus(compiled_ops=frozenset()))),
    "gradients-all-reduced": (NOTE, made_case(engine={"zero_optimization": {"stage": 2}})),
    "disk-too-small": (STOPS, made_case(gpus(free_disk_bytes=2 * GIGABYTE))),
    "disk-small": (SLOW, made_case(gpus(free_disk_bytes=4 * GIGABYTE))),
}  # fmt: skip


def with_engine(case: Case, engine: str) -> Case:
    return replace(case, config=replace(case.config, engine=engine))


PROVOKED["no-deepspeed"] = (STOPS, with_engine(PROVOKED["no-deepspeed"][1], "deepspeed"))
PROVOKED["nvme-without-deepspeed"] = (STOPS, with_engine(PROVOKED["nvme-without-deepspeed"][1], "fsdp"))
PROVOKED["muon-needs-whole-matrices"] = (STOPS, with_engine(PROVOKED["muon-needs-whole-matrices"][1], "deepspeed"))
PROVOKED["float16-at-stage-0"] = (STOPS, with_engine(PROVOKED["float16-at-stage-0"][1], "deepspeed"))


@pytest.mark.parametrize("code", PROVOKED)
def test_a_finding_is_provoked(code: str) -> None:
    severity, case = PROVOKED[code]
    (finding,) = [finding for finding in examine(case) if finding.code == code]  # once
    assert finding.severity == severity
    for text in (finding.what, finding.reason, finding.cure):
        assert text
        assert text == text.strip()
        assert "{" not in text


@pytest.mark.parametrize("machine", [GPUS, CPUS], ids=["gpus", "cpus"])
def test_nothing_is_found_where_nothing_is_wrong(machine: Machine) -> None:
    assert examine(made_case(machine)) == []


@pytest.mark.parametrize("path", sorted(ENGINE_FILES.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_engine_file_stops_only_where_its_disk_is_missing(path: Path, tmp_path: Path) -> None:
    engine_json = read_engine_json(str(path))
    for section in engine_json["zero_optimization"].values():
        if isinstance(section, dict) and "nvme_path" in section:
            section["nvme_path"] = str(tmp_path / "no-disk")
    found = [finding.code for finding in examine(made_case(engine=engine_json)) if finding.severity == STOPS]
    assert found == (["nvme-folder"] if "nvme" in path.stem else [])


def test_what_stops_comes_first() -> None:
    case = made_case(gpus(memory_bytes=4 * GIGABYTE, num_cores=8, compiled_ops=frozenset()), train__warmup_steps=5_000)
    order = [SEVERITIES.index(finding.severity) for finding in examine(case)]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}


def test_every_finding_of_the_room_is_provoked() -> None:
    """Codes as they stand in the source, with * for what is filled in."""
    patterns = set()
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding":
                code = node.args[1]
                parts = code.values if isinstance(code, ast.JoinedStr) else [code]
                patterns.add("".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in parts))
    assert len(patterns) > 50
    known = PROVOKED.keys() | GATHERED
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, code) for code in known)] == []
    assert [code for code in known if not any(re.fullmatch(pattern, code) for pattern in patterns)] == []


def test_the_cure_for_too_little_memory_is_the_cheapest_that_helps() -> None:
    def cure(**changes: Any) -> str:
        found = [f for f in examine(made_case(gpus(**changes))) if f.code == "memory-too-small"]
        return found[0].cure

    assert cure(memory_bytes=6 * GIGABYTE).startswith("set train.batch_size to 1")
    assert "activation_checkpointing" in cure(memory_bytes=4 * GIGABYTE)
    assert "GPUs with more memory" in cure(memory_bytes=GIGABYTE // 2)


def test_activations_are_counted_by_rows_and_layers() -> None:
    from mellow_ds.doctor.fit import activation_bytes

    case = made_case()
    a = ACTIVATIONS
    token = 31 * a.layer_token_bytes + a.base_token_bytes
    assert activation_bytes(case, recomputes=False) == 16 * (230 * token + 1.5 * 200_000 + 100 * 800_000)
    token = 30 * a.block_token_bytes + a.layer_token_bytes + a.base_token_bytes
    assert activation_bytes(case, recomputes=True) == 16 * (230 * token + 1.5 * 200_000 + 100 * 800_000)
