"""What the doctor prints: first what stops, then what is slow, then the arithmetic of the run."""

import textwrap
from typing import Any

from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import NOTE, SEVERITIES, SLOW, STOPS, Finding
from mellow_ds.doctor.fit import rank_memory
from mellow_ds.doctor.memory import Setup, back_end_of, readable, setup_of, state_bytes, stays_gathered
from mellow_ds.doctor.steps import precision_of, stage_of, step_arithmetic
from mellow_ds.doctor.traffic import fsdp_step_bytes, step_bytes
from mellow_ds.errors import ConfigError

_TITLES = {STOPS: "WILL NOT WORK", SLOW: "WILL BE SLOW, OR WASTE SOMETHING", NOTE: "TO BE KNOWN"}
_WIDTH = 110
_MARGIN = "    "


def format_report(case: Case, findings: list[Finding]) -> str:
    """Findings by severity, and the summary."""
    lines: list[str] = []
    for severity in SEVERITIES:
        own = [finding for finding in findings if finding.severity == severity]
        if own:
            lines += [_TITLES[severity], ""]
            for finding in own:
                lines += _paragraph(finding)
    if not lines:
        lines = ["nothing was found", ""]
    lines += ["ARITHMETIC", ""]
    lines += [f"  {name:<26} {value}" for name, value in summary(case)]
    return "\n".join(lines)


def as_json(case: Case, findings: list[Finding]) -> dict[str, Any]:
    """The same for programs."""
    return {"findings": [finding.as_dict() for finding in findings], "summary": dict(summary(case))}


def summary(case: Case) -> list[tuple[str, str]]:
    """(name, value) of what the run comes to, as far as it is known."""
    try:
        return [*_steps(case), *_sizes(case), *_memory(case)]
    except ConfigError:  # a batch below the world, a stage that there is not: said above
        return []


def _paragraph(finding: Finding) -> list[str]:
    def wrap(text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False)

    return [
        *wrap(finding.what, "  * ", _MARGIN),
        *wrap(f"why: {finding.reason}", _MARGIN, _MARGIN + "     "),
        *wrap(f"cure: {finding.cure}", _MARGIN, _MARGIN + "      "),
        "",
    ]


def _steps(case: Case) -> list[tuple[str, str]]:
    steps, machine = step_arithmetic(case), case.machine
    here = f"{machine.num_gpus} x {machine.gpu_name}" if machine.num_gpus else f"{machine.num_cores} cores"
    on = "GPUs elsewhere" if machine.is_remote else here
    rows = [
        ("ranks", f"{steps.world} ({machine.ranks_per_host} a host; {on})"),
        ("engine", f"{back_end_of(case)}, stage {stage_of(case)}, {precision_of(case)}"),
        (
            "examples a step",
            f"{steps.global_batch_size} = {steps.world} ranks x {steps.micro_batches} micro-batches of at most "
            f"{steps.rank_batch_size}",
        ),
    ]
    if case.shards is not None:
        rows.append(
            (
                "examples an epoch",
                f"{case.shards.num_epoch_examples} of {case.shards.num_clips} clips in {case.shards.num_shards} shards "
                f"({readable(sum(case.shards.shard_bytes))})",
            )
        )
        rows.append(("steps", f"{steps.total_steps} ({steps.epoch_steps} an epoch)"))
    if case.texts is not None:
        texts = case.texts
        rows.append(
            (
                "tokens a row",
                f"{texts.mean_row:.0f} on average, {texts.longest_row} at most, {texts.mean_answer:.0f} of them learned"
                f" ({texts.num_sampled} questions sampled{', estimated' if texts.is_estimate else ''})",
            )
        )
    return rows


def _sizes(case: Case) -> list[tuple[str, str]]:
    if case.model is None:
        return []
    rows = []
    for part in case.model.parts:
        state = "frozen" if part.is_frozen else "trained" if part.num_trained == part.num_parameters else (
            f"{part.num_trained / 1e6:.3f} M trained"
        )  # fmt: skip
        rows.append((part.name, f"{part.num_parameters / 1e6:.3f} M parameters, {state}"))
    if case.model.origin:
        rows.append(("decoder's sizes from", case.model.origin))
    return rows


def _memory(case: Case) -> list[tuple[str, str]]:
    if case.model is None:
        return []
    setup, needed = setup_of(case), rank_memory(case)
    rows = []
    for stage in range(4):
        held = state_bytes(case.model, setup_of(case, stage))
        mark = "  <- this run" if stage == setup.stage else ""
        rows.append(
            (f"state a rank, stage {stage}", f"{readable(max(held.lasting, 0))} on the device{_elsewhere(held)}{mark}")
        )
    rows.append(
        (
            "activations a micro-batch",
            f"{readable(needed.activations)} at most, logits included"
            + (" (recomputed)" if case.config.train.activation_checkpointing else ""),
        )
    )
    room = f" of {readable(case.machine.memory_bytes)}" if case.machine.memory_bytes else ""
    rows.append(("peak of a rank", f"{readable(needed.peak)}{room}, buckets and gathered weights included"))
    if setup.world > 1:
        rows.append(("sent a rank and step", f"{readable(int(_sent(case, setup)))} at most (docs/communication.md)"))
    return rows


def _sent(case: Case, setup: Setup) -> float:
    """Bytes that a rank hands to the network in a step."""
    model = case.model
    assert model is not None
    sizes = (setup.stage, model.num_trained, setup.world, setup.number_bytes, step_arithmetic(case).micro_batches)
    if setup.back_end == "fsdp":
        return fsdp_step_bytes(*sizes)
    decoder = model.part("decoder")
    is_embedding_trained = decoder.num_trained == decoder.num_parameters
    return step_bytes(
        *sizes,
        all_reduces=case.engine_json.get("zero_optimization", {}).get("use_multi_rank_bucket_allreduce", True),
        gathers=1 if stays_gathered(model, setup) else 2,
        num_tied=model.largest_parameter if model.is_tied and is_embedding_trained else 0,
    )


def _elsewhere(held: Any) -> str:
    places = [
        f"{readable(size)} {where}" for size, where in ((held.host, "in host memory"), (held.nvme, "on NVMe")) if size
    ]
    return "".join(f", {place}" for place in places)
