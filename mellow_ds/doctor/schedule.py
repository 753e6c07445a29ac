"""Findings about the length of the run against what is counted in steps: warm-up, saving, phases, decays."""

from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.steps import step_arithmetic

_LONG_WARMUP = 0.3  # of the run; beyond that hardly anything is left of the schedule
_MANY_SAVES = 10  # steps between checkpoints below which saving shows


def check_schedule(case: Case) -> list[Finding]:
    """Needs the number of steps, by train.max_steps or by the manifests."""
    train = case.config.train
    total = step_arithmetic(case).total_steps
    if not total:
        return []
    return [
        *_warmup(case, total),
        *_saving(case, total),
        *_decays(case, total),
        *[
            Finding(
                NOTE, "phase-never",
                f"train.phases has a phase from step {phase.from_step}, but the run has {total} steps",
                "the phase is never reached", "let it begin earlier, or train longer (train.num_epochs, max_steps)",
            )
            for phase in train.phases
            if phase.from_step >= total
        ],
    ]  # fmt: skip


def _warmup(case: Case, total: int) -> list[Finding]:
    warmup = case.config.train.warmup_steps
    if warmup and warmup >= total:
        return [
            Finding(
                STOPS, "warmup-beyond-run", f"train.warmup_steps is {warmup}, but the run has only {total} steps",
                "the learning rate would never reach its peak; the run is refused",
                f"set it to some {max(total // 20, 1)} steps, or train longer",
            )
        ]  # fmt: skip
    if warmup > _LONG_WARMUP * total:
        return [
            Finding(
                SLOW, "warmup-long", f"train.warmup_steps is {warmup} of {total} steps",
                f"{100 * warmup / total:.0f} percent of the run is spent below the peak learning rate",
                f"set it to some {max(total // 20, 1)} steps",
            )
        ]  # fmt: skip
    return []


def _saving(case: Case, total: int) -> list[Finding]:
    train, found = case.config.train, []
    every = train.save_every_steps
    if not every or every >= total:
        found.append(
            Finding(
                SLOW, "saves-only-at-end",
                f"train.save_every_steps is {every}, and the run has {total} steps: only its end is saved",
                "a run that is killed before that starts again from nothing",
                f"set it to some {max(total // 10, 1)} steps",
            )
        )  # fmt: skip
    elif every < _MANY_SAVES < total:
        found.append(
            Finding(
                SLOW, "saves-often", f"train.save_every_steps is {every}",
                "every save holds up training at least for the copy out of the device, and old ones are removed again",
                "save as often as you can afford to lose the steps in between",
            )
        )  # fmt: skip
    if train.evaluate_every_steps and train.evaluate_every_steps > total:
        found.append(
            Finding(
                NOTE, "evaluation-never",
                f"train.evaluate_every_steps is {train.evaluate_every_steps}, but the run has {total} steps",
                "the loss on data.eval_shards is never measured", f"set it to some {max(total // 10, 1)} steps",
            )
        )  # fmt: skip
    return found


def _decays(case: Case, total: int) -> list[Finding]:
    train = case.config.train
    span = total - train.warmup_steps
    steps = {"step": ("decay_steps", train.decay_steps), "cosine_restarts": ("restart_steps", train.restart_steps)}
    if train.scheduler not in steps or steps[train.scheduler][1] <= span:
        return []
    key, value = steps[train.scheduler]
    return [
        Finding(
            NOTE, "schedule-never-turns",
            f"train.{key} is {value}, but only {span} steps follow the warm-up: "
            f"the schedule '{train.scheduler}' does not come to its first turn",
            "the learning rate stays near its peak to the end", f"lower train.{key} below {span}, or take cosine",
        )
    ]  # fmt: skip
