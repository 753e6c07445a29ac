"""ds_configs/README.md: its table has a row for each file, and its numbers are those of the formulas."""

import json
import re
from pathlib import Path

from mellow_ds.doctor.memory import bytes_a_parameter
from mellow_ds.doctor.traffic import step_turns
from mellow_ds.ds_config import offload_device, read_engine_json, zero_stage

FOLDER = Path(__file__).resolve().parent.parent.parent / "ds_configs"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
WORLD = int(re.search(r"on N = (\d+) ranks", README).group(1))  # type: ignore[union-attr]
ROWS = {
    row[0].strip("` "): [cell.strip() for cell in row[1:]]
    for row in (line.strip("|\n ").split("|") for line in README.splitlines() if line.startswith("| `"))
}


def said(cell: str) -> tuple[float, float, float]:
    """`2 + 2.25 host` as (2, 2.25, 0)."""
    found = {kind or "device": float(number) for number, kind in re.findall(r"([\d.]+) ?(host|NVMe)?", cell)}
    return found["device"], found.get("host", 0.0), found.get("NVMe", 0.0)


def test_the_table_has_a_row_for_each_file() -> None:
    assert sorted(ROWS) == sorted(path.name for path in FOLDER.glob("*.json"))


def test_bytes_a_parameter_are_those_of_the_formula() -> None:
    for name, (_, full, half, _, _) in ROWS.items():
        engine_json = read_engine_json(str(FOLDER / name))
        stage = zero_stage(engine_json)
        offload = [offload_device(engine_json, what) for what in ("offload_optimizer", "offload_param")]
        always_half = any(engine_json[section]["enabled"] is True for section in ("bf16", "fp16"))
        assert said(half) == bytes_a_parameter(stage, WORLD, 2, *offload), name
        assert (full == "-") == always_half, name
        if not always_half:
            assert said(full) == bytes_a_parameter(stage, WORLD, 4, *offload), name


def test_traffic_is_that_of_the_formula() -> None:
    for name, (*_, sent, _) in ROWS.items():
        engine_json = read_engine_json(str(FOLDER / name))
        all_reduces = engine_json["zero_optimization"].get("use_multi_rank_bucket_allreduce", True)
        turns = step_turns(zero_stage(engine_json), all_reduces=all_reduces)
        assert sent == f"{turns} P (N - 1) / N", name


def test_what_a_file_is_called_is_what_it_does() -> None:
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        stage, devices = zero_stage(content), {offload_device(content, "offload_optimizer")}
        if match := re.fullmatch(r"zero(\d)(?:_(offload|nvme))?", path.stem):
            assert stage == int(match.group(1))
            assert devices == {{"offload": "cpu", "nvme": "nvme"}.get(match.group(2) or "", "none")}
            assert content["bf16"] == content["fp16"] == {"enabled": "auto"}
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                    "gradient_clipping"):  # fmt: skip
            assert content[key] == "auto", path.name
