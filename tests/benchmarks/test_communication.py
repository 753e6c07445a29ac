"""The benchmark of traffic: its table, and that its formula is the one that `mellow-ds doctor` reckons with."""

from dataclasses import asdict, replace

import communication
import pytest

from mellow_ds.doctor.traffic import fsdp_step_bytes, step_bytes
from mellow_ds.verify.traffic import Sizes, expected_bytes


def test_the_formula_is_that_of_the_doctor() -> None:
    sizes = Sizes(trained=1000, root=100, frozen=0, tied=90)
    checked = 0
    for variant in communication.variants():
        if variant.kind != "deepspeed" or not variant.frozen_whole_megabytes:
            continue
        for accumulation in (1, 3):
            case = replace(variant, accumulation=accumulation)
            doctor = step_bytes(case.stage, 1000, 4, 4, accumulation, case.all_reduces, case.gathers, num_tied=90)
            assert expected_bytes(case, sizes, 4) == pytest.approx(doctor), case.name
            checked += 1
    assert checked == 14


def test_the_formula_of_fsdp2_is_that_of_the_doctor() -> None:
    checked = 0
    for variant in communication.variants():
        if variant.kind != "fsdp" or not variant.frozen_whole_megabytes:
            continue
        for accumulation, precision, number_bytes in ((1, "float32", 4), (3, "bfloat16", 2)):
            case = replace(variant, accumulation=accumulation, precision=precision)
            expected = expected_bytes(case, Sizes(trained=1000, root=0, frozen=0), 4)
            assert fsdp_step_bytes(case.stage, 1000, 4, number_bytes, accumulation) == pytest.approx(expected), case
            checked += 1
    assert checked == 8


def test_the_table_shows_multiples_of_the_trained_bytes_and_the_worst_world() -> None:
    case = asdict(communication.variants()[0])
    case["loopback_bytes"] = None
    rows = [
        {**case, "world": 2, "trained": 100, "ring_bytes": 400.0, "formula": 400.0, "difference": 0.0},
        {**case, "world": 4, "trained": 100, "ring_bytes": 606.0, "formula": 600.0, "difference": 0.01},
    ]
    assert communication.table(rows) == [["ZeRO-0", "float32", "1", "2.000 / 2.020", "2.000", "+1.00 %"]]
    for row in rows:
        row["loopback_bytes"] = 404.0 if row["world"] == 2 else 612.0
    assert communication.table(rows)[0][-1] == "2.020 / 2.040"
