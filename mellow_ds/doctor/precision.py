"""Findings about number formats: devices that lack one, loss scaling of float16."""

from typing import Any

from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.steps import precision_of, stage_of

_HIGH_SCALE_POWER = 20  # 2**16 is DeepSpeed's default; each power more costs a skipped step at the start
_SECTION_OF = {"bfloat16": "bf16", "float16": "fp16"}


def check_precision(case: Case) -> list[Finding]:
    """Whether the device has the format that is asked for, and is quick in it."""
    precision, machine = precision_of(case), case.machine
    found: list[Finding] = []
    device = machine.gpu_name or ("the GPU" if machine.on_gpus else "the CPU")
    if precision == "float16":
        if not machine.has_float16:
            found.append(_missing(precision, device, "bfloat16 (or float32)"))
        else:
            found += _loss_scale(case.engine_json.get("fp16") or {}, machine.has_bfloat16 and machine.on_gpus)
        if case.config.engine == "deepspeed" and not stage_of(case):
            found.append(
                Finding(
                    STOPS, "float16-at-stage-0", "float16 is asked for at ZeRO stage 0",
                    "DeepSpeed unscales gradients there whose loss it did not scale: nearly all of them would be zero",
                    "take stage 1 or 2 (ds_configs/fp16.json), bfloat16, or engine auto or fsdp",
                )
            )  # fmt: skip
    elif precision == "bfloat16" and not machine.has_bfloat16:
        found.append(_missing(precision, device, "float16 (or float32)"))
    elif precision == "bfloat16" and not machine.on_gpus:
        found.append(
            Finding(
                SLOW, "bfloat16-on-cpu", "bfloat16 is asked for on CPUs",
                "bf16 products there are 5 to 30 times slower than float32 unless the CPU has units for them",
                "leave train.mixed_precision.use_mixed_precision at auto, and bf16.enabled in the engine JSON at auto",
            )
        )  # fmt: skip
    elif precision == "float32" and machine.on_gpus:
        found.append(
            Finding(
                SLOW, "float32-on-gpu", "float32 is asked for on GPUs",
                "matrix products take several times as long as in bfloat16, and activations twice the memory",
                "set train.mixed_precision.use_mixed_precision to auto",
            )
        )  # fmt: skip
    return found


def _missing(precision: str, device: str, other: str) -> Finding:
    return Finding(
        STOPS, f"no-{precision}", f"{precision} is asked for, but {device} does not compute in it",
        "the engine refuses it, or products are emulated at a fraction of the speed",
        f"take {other}: train.mixed_precision, and {_SECTION_OF[precision]}.enabled in the engine JSON",
    )  # fmt: skip


def _loss_scale(section: dict[str, Any], has_bfloat16: bool) -> list[Finding]:
    found = []
    static = section.get("loss_scale", 0) or 0
    if static:
        found.append(
            Finding(
                SLOW, "loss-scale-static", f"fp16.loss_scale is {static} in the engine JSON: the loss scale is fixed",
                "where gradients grow every step overflows and is skipped, where they shrink they round to zero; "
                "nothing adapts",
                "set fp16.loss_scale to 0 (dynamic) with fp16.min_loss_scale 1",
            )
        )  # fmt: skip
    else:
        floor = section.get("min_loss_scale")
        if floor is None or floor <= 0:
            found.append(
                Finding(
                    NOTE if floor is None else STOPS, "loss-scale-floor",
                    "float16 without a floor of the loss scale: fp16.min_loss_scale "
                    + ("is not in the engine JSON" if floor is None else f"is {floor} in the engine JSON"),
                    "without one a run of overflows halves the scale towards zero, where gradients vanish without a "
                    "word; DeepSpeed refuses 0, and what is not written is its default (1 in 0.19)",
                    "set fp16.min_loss_scale to 1, as ds_configs/fp16.json does",
                )
            )  # fmt: skip
        power = section.get("initial_scale_power", 16)
        if power > _HIGH_SCALE_POWER:
            found.append(
                Finding(
                    SLOW, "loss-scale-start", f"fp16.initial_scale_power is {power} in the engine JSON",
                    f"the first {power - 16} steps or so overflow and are skipped, each halving the scale; "
                    "train.max_skipped_steps counts them",
                    "set it to 16",
                )
            )  # fmt: skip
    if has_bfloat16:
        found.append(
            Finding(
                NOTE, "float16-where-bfloat16", "float16 is asked for on a GPU that has bfloat16",
                "float16 needs loss scaling and skips steps, bfloat16 needs neither and is as fast",
                "set train.mixed_precision.mixed_precision_dtype to bfloat16",
            )
        )  # fmt: skip
    return found
