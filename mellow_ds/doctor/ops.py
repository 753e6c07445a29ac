"""Findings about the back end: what it compiles, NVMe folders, versions, sections that it would ignore."""

from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.memory import back_end_of
from mellow_ds.doctor.steps import stage_of
from mellow_ds.ds_config import offload_device
from mellow_ds.engine.ops import ASYNC_IO, nvme_problem

_OFFLOADED = ("offload_optimizer", "offload_param")
_BUFFER_NUMBERS = 100_000_000  # DeepSpeed's offload_param.buffer_size where the JSON has none


def check_ops(case: Case) -> list[Finding]:
    """Whether the engine that is asked for can be built here."""
    return [*_back_end(case), *_nvme(case), *_compiled(case), *_traffic(case)]


def _back_end(case: Case) -> list[Finding]:
    problem, engine = case.machine.deepspeed_problem, case.config.engine
    if engine == "fsdp" or not problem:
        return []
    if engine == "deepspeed":
        return [
            Finding(
                STOPS, "no-deepspeed", f"engine is deepspeed, which cannot be used here: {problem}",
                "there is nothing to train with", "install it (see README.md), or take engine auto or fsdp",
            )
        ]  # fmt: skip
    return [
        Finding(
            NOTE, "fsdp-takes-over", f"DeepSpeed cannot be used here: {problem}",
            "engine auto takes FSDP2 from the same JSON", "install DeepSpeed (see README.md) where you want it",
        )
    ]  # fmt: skip


def _nvme(case: Case) -> list[Finding]:
    devices = {what: offload_device(case.engine_json, what) for what in _OFFLOADED}
    stage, back_end = stage_of(case), back_end_of(case)
    if "nvme" in devices.values() and back_end == "fsdp":
        return [
            Finding(
                STOPS, "nvme-without-deepspeed", "the engine JSON offloads to nvme, and FSDP2 trains",
                "only DeepSpeed offloads to NVMe", "take cpu in the engine JSON, or engine deepspeed",
            )
        ]  # fmt: skip
    found = []
    if not case.machine.is_remote and (problem := nvme_problem(case.engine_json)):
        what, _, cure = problem.partition(": ")
        found.append(
            Finding(STOPS, "nvme-folder", what, "parameters and optimizer states have nowhere to go", cure)
        )  # fmt: skip
    if not stage and any(device != "none" for device in devices.values()):
        if back_end == "fsdp":
            found.append(
                Finding(
                    STOPS, "offload-at-stage-0", "the engine JSON offloads at stage 0",
                    "nothing is sharded there, and FSDP2 offloads only what it shards", "take stage 1, 2 or 3",
                )
            )  # fmt: skip
        else:
            found.append(
                Finding(
                    SLOW, "offload-at-stage-0", "the engine JSON offloads at stage 0",
                    "DeepSpeed offloads only what ZeRO partitions: nothing is offloaded", "take stage 2 or 3",
                )
            )  # fmt: skip
    elif stage < 3 and devices["offload_param"] != "none" and back_end == "deepspeed":
        found.append(
            Finding(
                SLOW, "offload-param-below-3", f"the engine JSON has offload_param at stage {stage}",
                "parameters are partitioned, and so offloaded, at stage 3 only",
                "take stage 3 (ds_configs/zero3_offload.json), or drop the section",
            )
        )  # fmt: skip
    if devices["offload_param"] == "nvme" and case.model is not None:
        size = int(case.engine_json["zero_optimization"]["offload_param"].get("buffer_size", _BUFFER_NUMBERS))
        part = -(-case.model.largest_parameter // case.machine.world)
        if part > size:
            found.append(
                Finding(
                    STOPS, "nvme-buffer-small",
                    f"zero_optimization.offload_param.buffer_size is {size} numbers, but a rank's part of the largest "
                    f"parameter has {part}",
                    "a parameter passes to NVMe and back through one buffer", f"set it to {part} or more",
                )
            )  # fmt: skip
    return found


def _compiled(case: Case) -> list[Finding]:
    machine = case.machine
    found = [
        Finding(STOPS if machine.on_gpus else NOTE, "stale-lock", lock, "torch waits until a lock is gone", "remove it")
        for lock in machine.stale_locks
    ]
    if back_end_of(case) != "deepspeed":
        return found
    for name, problem in machine.op_problems.items():
        if not problem:
            continue
        reason, _, cure = problem.partition(": ")
        if name == ASYNC_IO:
            found.append(
                Finding(STOPS, f"op-{name}", f"DeepSpeed's op {name}, which NVMe offload needs, does not build here",
                        reason, cure or "take offload to cpu")
            )  # fmt: skip
        else:
            found.append(
                Finding(SLOW, f"op-{name}", f"DeepSpeed's op {name} does not build here: torch's optimizer takes its "
                        "place", reason, cure or "run ds_report for more")
            )  # fmt: skip
    new = [name for name, problem in machine.op_problems.items() if not problem and name not in machine.compiled_ops]
    if new:
        found.append(
            Finding(
                NOTE, "compiles-first", f"DeepSpeed compiles {', '.join(new)} on first use",
                "the first start of a machine waits minutes for it, later ones do not",
                "start one short run first, before many ranks do",
            )
        )  # fmt: skip
    return found


def _traffic(case: Case) -> list[Finding]:
    zero = case.engine_json.get("zero_optimization") or {}
    if case.machine.world == 1 or stage_of(case) not in (1, 2) or back_end_of(case) != "deepspeed":
        return []
    if not zero.get("use_multi_rank_bucket_allreduce", True):
        return []
    return [
        Finding(
            NOTE, "gradients-all-reduced",
            "zero_optimization.use_multi_rank_bucket_allreduce is on (DeepSpeed's default)",
            "gradients are all-reduced where every rank needs only its part: 3 P (N - 1) / N numbers a step in place "
            "of 2 P (N - 1) / N, in fewer messages",
            "set it to false, as ds_configs/zero1.json and zero2.json do, where the network is what waits",
        )
    ]  # fmt: skip
