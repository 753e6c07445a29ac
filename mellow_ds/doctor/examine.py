"""All rules over one case."""

from collections.abc import Callable

from mellow_ds.doctor.batch import check_batch
from mellow_ds.doctor.data import check_data
from mellow_ds.doctor.disk import check_disk
from mellow_ds.doctor.facts import Case
from mellow_ds.doctor.findings import STOPS, Finding, by_severity
from mellow_ds.doctor.fit import check_fit
from mellow_ds.doctor.lengths import check_lengths
from mellow_ds.doctor.ops import check_ops
from mellow_ds.doctor.parts import check_parts
from mellow_ds.doctor.precision import check_precision
from mellow_ds.doctor.schedule import check_schedule
from mellow_ds.doctor.steps import stage_of, step_arithmetic
from mellow_ds.errors import ConfigError

RULES: tuple[Callable[[Case], list[Finding]], ...] = (
    check_batch,
    check_precision,
    check_schedule,
    check_fit,
    check_data,
    check_lengths,
    check_parts,
    check_ops,
    check_disk,
)


def examine(case: Case) -> list[Finding]:
    """What all rules find, what stops first. Pure: everything that is known stands in `case`."""
    try:
        stage_of(case)
    except ConfigError as error:
        return [
            Finding(
                STOPS, "engine-json", str(error), "nothing else can be judged without it", "take a file of ds_configs/",
            )
        ]  # fmt: skip
    try:
        step_arithmetic(case)
    except ConfigError:  # all else is counted in steps
        return check_batch(case)
    return by_severity(finding for rule in RULES for finding in rule(case))
