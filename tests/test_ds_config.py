"""The engine JSON against the run configuration."""

import json
from pathlib import Path

import pytest

from mellow_ds.config.train_keys import MixedPrecisionConfig, TrainConfig
from mellow_ds.ds_config import StepShape, check_optimizer, choose_precision, read_engine_json, resolve_engine_json
from mellow_ds.errors import ConfigError

SHAPE = StepShape(4, 8, 2, 0.5, 1e-3, 0.01, "bfloat16")
FILES = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_resolves(path: Path) -> None:
    engine_json = read_engine_json(str(path))
    precision = choose_precision(MixedPrecisionConfig(), engine_json, has_gpu=True)
    shape = StepShape(4, 8, 2, 0.5, 1e-3, 0.01, precision)
    resolved = resolve_engine_json(engine_json, shape)
    assert resolved["train_batch_size"] == 4 * 8 * 2
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] == (precision == "bfloat16")
    assert resolved["fp16"]["enabled"] == (precision == "float16")
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            r"says train_micro_batch_size_per_gpu 4, but the run says 8 \(train\.bat",
        ),
        ({"gradient_clipping": 1.0}, r"gradient_clipping 1\.0, but the run says 0\.5 \(train\.max_grad_norm\)"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled True, but the run says False \(train\.mixed_precision\)"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"lr 0\.1, but the run says 0\.001"),
        ({"scheduler": {"type": "WarmupLR"}}, "belongs to train.scheduler"),
        ({"zero_optimization": {"stage": 4}}, r"stage in the engine JSON is 4; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, r"zero_optimization\.reduce_bucket_size"),
    ],
)
def test_a_contradiction_is_refused_by_name(content: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_engine_json(content, SHAPE)


def test_equal_values_and_autos_are_fine() -> None:
    content = {"train_batch_size": 64, "gradient_clipping": "auto", "optimizer": {"params": {"lr": 1e-3}}}
    assert resolve_engine_json(content, SHAPE)["train_batch_size"] == 64


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "Lamb"}, r"optimizer: says type Lamb, but the run says AdamW \(train\.optimizer_type\)"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "type Adam, but the run says AdamW"),
        ({"type": "OneBitAdam"}, "type OneBitAdam, but the run says AdamW"),
        ({"params": {"betas": [0.5, 0.6]}}, r"betas \(0\.5, 0\.6\), but the run says \(0\.9, 0\.999\)"),
        ({"params": {"eps": 1e-3}}, r"eps 0\.001, but the run says 1e-08"),
    ],
)
def test_an_optimizer_that_is_not_the_run_s_is_refused(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer({"optimizer": section}, TrainConfig())


@pytest.mark.parametrize(
    "section",
    [{}, {"type": "auto"}, {"type": "Adam"}, {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": "auto"}}],
)
def test_an_optimizer_that_is_the_run_s_is_taken(section: dict) -> None:
    check_optimizer({"optimizer": section}, TrainConfig())


def test_files_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there: ds_configs/ has one for each stage"):
        read_engine_json(str(tmp_path / "no.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON that can be read"):
        read_engine_json(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("mixed", "engine_json", "has_gpu", "precision"),
    [
        (MixedPrecisionConfig(), {}, False, "float32"),
        (MixedPrecisionConfig(), {}, True, "bfloat16"),
        (MixedPrecisionConfig(mixed_precision_dtype="float16"), {}, True, "float16"),
        (MixedPrecisionConfig(), {"fp16": {"enabled": True}}, False, "float16"),
        (MixedPrecisionConfig("true"), {}, False, "bfloat16"),
        (MixedPrecisionConfig("false"), {"bf16": {"enabled": True}}, True, "float32"),
    ],
)
def test_precision_is_the_runs_then_the_jsons_then_the_machines(mixed, engine_json, has_gpu, precision) -> None:
    assert choose_precision(mixed, engine_json, has_gpu) == precision
