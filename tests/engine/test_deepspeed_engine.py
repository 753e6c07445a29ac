"""What DeepSpeed alone has: files in ds_configs, and private names that this project leans on."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS

from mellow_ds.config.train_keys import MixedPrecisionConfig
from mellow_ds.ds_config import choose_precision, offload_device, read_engine_json
from mellow_ds.engine import deepspeed_engine
from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine, avoid_cpu_compilation
from mellow_ds.engine.ops import is_compiled, op_problem, ops_needed
from mellow_ds.engine.optimizer import parameter_groups
from mellow_ds.errors import ConfigError
from mellow_ds.verify.small import TRAIN, small_model
from mellow_ds.world import World
from tests.engine.cases import EXAMPLES, reference, shape, train
from tests.guide import quoted
from tests.ranks import run_ranks


def test_the_private_switch_that_avoids_compiling_is_still_there() -> None:
    """FACTS: two ranks wait two minutes for deepspeed_shm_comm; the name is private to DeepSpeed 0.19."""
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    avoid_cpu_compilation()
    assert torch.cuda.is_available() or not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_a_step_leaves_the_compiler_alone() -> None:
    """DeepSpeed's engine imports its Muon, whose kernels it would have torch compile."""
    code = (
        "import sys; from mellow_ds.engine import deepspeed_engine as engine; engine.avoid_muon_compilation(); "
        "from deepspeed.runtime.compiler import compile; import torch; assert compile() is torch.compile; "
        "import deepspeed.runtime.zero.muon.muon_optimizer; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Chosen(torch.optim.SGD):
    """Stands for an optimizer that only builds beside a GPU; keeps what it is made with."""

    def __init__(self, groups: Any, **arguments: Any) -> None:
        super().__init__(groups, lr=arguments["lr"])
        self.arguments = arguments


@pytest.mark.parametrize(
    ("kind", "stage", "offload", "place", "named", "adamw"),
    [
        ("AdamW", 2, "none", "adam.FusedAdam", "DeepSpeed FusedAdam (AdamW)", {"adam_w_mode": True}),
        ("Adam", 3, "none", "adam.FusedAdam", "DeepSpeed FusedAdam (Adam)", {"adam_w_mode": False}),
        ("AdamW", 2, "cpu", "adam.DeepSpeedCPUAdam", "DeepSpeed CPUAdam (AdamW)", {"adamw_mode": True}),
        ("Adam", 3, "cpu", "adam.DeepSpeedCPUAdam", "DeepSpeed CPUAdam (Adam)", {"adamw_mode": False}),
        ("Lamb", 0, "none", "lamb.FusedLamb", "DeepSpeed FusedLamb", {}),
    ],
)
def test_where_there_is_a_gpu_deepspeed_s_optimizers_are_taken_or_replaced_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    kind: str, stage: int, offload: str, place: str, named: str, adamw: dict[str, bool],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(f"deepspeed.ops.{place}", Chosen)
    config = replace(TRAIN, optimizer_type=kind, betas=(0.8, 0.9), eps=1e-6)
    engine_json = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}}}
    groups = parameter_groups(small_model(seed=1), config)
    monkeypatch.setattr(deepspeed_engine, "is_compiled", lambda _: False)
    with caplog.at_level("INFO", "mellow_ds.engine"):
        optimizer, name = deepspeed_engine._build_optimizer(groups, engine_json, config, stage)
    assert quoted("which takes minutes, once in this environment") in caplog.text
    assert isinstance(optimizer, Chosen)
    assert name == named
    assert optimizer.arguments == {"lr": config.learning_rate, "betas": (0.8, 0.9), "eps": 1e-6, **adamw}

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("nvcc is not there\nand more")

    monkeypatch.setattr(f"deepspeed.ops.{place}", fails)
    with caplog.at_level("WARNING", "mellow_ds.engine"):
        optimizer, name = deepspeed_engine._build_optimizer(groups, engine_json, config, stage)
    assert type(optimizer) is (torch.optim.Adam if kind == "Adam" else torch.optim.AdamW)
    assert name == f"torch fused {type(optimizer).__name__}"
    assert "fused optimizer does not build here (nvcc is not there); torch's takes its place" in caplog.text


def check_every_file(world: World, folder: Path, nvme: Path) -> list[str]:
    trained = []
    for path in sorted(folder.glob("*.json")):
        engine_json = read_engine_json(str(path))
        for what in ("offload_optimizer", "offload_param"):
            if offload_device(engine_json, what) == "nvme":
                engine_json["zero_optimization"][what]["nvme_path"] = str(nvme)
        precision = choose_precision(MixedPrecisionConfig(), engine_json, has_gpu=False)
        chosen = replace(shape(world, 1), precision=precision)
        arguments = (small_model(seed=1), engine_json, chosen, TRAIN, torch.device("cpu"))
        refusal = refused(engine_json, precision)
        if refusal:
            with pytest.raises(ConfigError, match=refusal):
                DeepSpeedEngine(*arguments)
            continue
        if path.stem == "zero3_nvme" and not is_compiled("async_io"):
            continue  # compiling it takes ten minutes here
        engine = DeepSpeedEngine(*arguments)
        losses, _ = train(engine, small_model(seed=1).num_audio_tokens, world, 1, EXAMPLES[:2])
        tolerance = 1e-5 if precision == "float32" else 2e-2
        assert losses == pytest.approx(reference(2)[0], rel=tolerance), path.name
        assert precision in engine.name
        engine.close()
        trained.append(path.stem)
    return trained


def refused(engine_json: dict[str, Any], precision: str) -> str:
    """What is said where this machine lacks something that the file needs; empty where it lacks nothing."""
    if precision == "float16" and not get_accelerator().is_fp16_supported():
        return "float16 is not supported by DeepSpeed on this cpu: take bfloat16"
    needed = ops_needed(engine_json, "AdamW", has_gpu=False)
    if any(op_problem(name, ALL_OPS, has_gpu=False) for name in needed):
        return "offloads to nvme, for which DeepSpeed compiles async_io"
    return ""


def test_every_shipped_engine_file_trains(tmp_path: Path) -> None:
    """ZeRO 0 to 3, offload, bf16: two steps of the reference on a CPU; what it has not is one clear line."""
    folder = Path(__file__).resolve().parent.parent.parent / "ds_configs"
    trained = run_ranks(2, check_every_file, folder, tmp_path)[0]
    assert {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "bf16"} <= set(trained)
    assert is_compiled("async_io") == ("zero3_nvme" in trained)
