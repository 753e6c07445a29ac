"""What is said of ops that do not build, and of NVMe folders, before DeepSpeed tries."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mellow_ds.engine.ops import ASYNC_IO, check_nvme, is_compiled, nvme_problem, op_problem, ops_needed
from mellow_ds.errors import ConfigError


def builder(fits: Any) -> SimpleNamespace:
    def is_compatible(_: bool) -> bool:
        if isinstance(fits, Exception):
            raise fits
        return bool(fits)

    return SimpleNamespace(is_compatible=is_compatible)


def offloading(device: str, path: Path | str | None, stage: int = 3, what: str = "offload_param") -> dict[str, Any]:
    section = {"device": device} if path is None else {"device": device, "nvme_path": str(path)}
    return {"zero_optimization": {"stage": stage, what: section}}


def test_ops_that_a_run_compiles() -> None:
    plain, cpu, nvme = {}, offloading("cpu", None, 2, "offload_optimizer"), offloading("nvme", "a")
    assert ops_needed(plain, "AdamW", has_gpu=True) == ("fused_adam",)
    assert ops_needed(plain, "Muon", has_gpu=True) == ()
    assert ops_needed(plain, "Lamb", has_gpu=True) == ("fused_lamb",)
    assert ops_needed(cpu, "Adam", has_gpu=True) == ("cpu_adam",)
    assert ops_needed(cpu, "Adam", has_gpu=False) == ()
    assert ops_needed(nvme, "AdamW", has_gpu=False) == (ASYNC_IO,)


def test_reasons_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert op_problem(ASYNC_IO, {}, has_gpu=False) == "DeepSpeed has none for this kind of device"
    assert "apt-get install libaio-dev" in op_problem(ASYNC_IO, {ASYNC_IO: builder(False)}, has_gpu=False)
    assert op_problem("cpu_adam", {"cpu_adam": builder(ValueError("no AVX\nat all"))}, has_gpu=False) == "no AVX"
    assert op_problem("cpu_adam", {"cpu_adam": builder(True)}, has_gpu=False) == ""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in op_problem("cpu_adam", {"cpu_adam": builder(True)}, has_gpu=False)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name, path=None: None if name == "nvcc" else f"{path}/{name}")
    assert "install the CUDA toolkit" in op_problem("fused_adam", {"fused_adam": builder(True)}, has_gpu=True)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert "pip install ninja" in op_problem("fused_adam", {"fused_adam": builder(True)}, has_gpu=True)


def test_a_cuda_compiler_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    problem = op_problem("fused_adam", {"fused_adam": builder(True)}, has_gpu=True)
    assert problem == f"{nvcc} is of CUDA 9.2, but torch was built with 13.0: install the toolkit of the same version"
    monkeypatch.setattr("torch.version.cuda", "9.1")
    assert op_problem("fused_adam", {"fused_adam": builder(True)}, has_gpu=True) == ""


def test_nvme_folders(tmp_path: Path) -> None:
    assert nvme_problem({}) == ""
    assert nvme_problem(offloading("cpu", None)) == ""
    assert nvme_problem(offloading("nvme", tmp_path)) == ""
    assert "only stage 3 does that" in nvme_problem(offloading("nvme", tmp_path, stage=2))
    assert "nvme_path is missing" in nvme_problem(offloading("nvme", None))
    assert "is not there: make it on a local NVMe disk" in nvme_problem(offloading("nvme", tmp_path / "no"))


def test_deepspeed_is_not_asked_for_what_it_cannot_do(tmp_path: Path) -> None:
    fine, missing = {ASYNC_IO: builder(True)}, {ASYNC_IO: builder(False)}
    check_nvme(offloading("nvme", tmp_path), fine, has_gpu=False)
    check_nvme(offloading("cpu", None), missing, has_gpu=False)
    with pytest.raises(ConfigError, match=r"offloads to nvme, for which DeepSpeed compiles async_io: libaio and its"):
        check_nvme(offloading("nvme", tmp_path), missing, has_gpu=False)
    with pytest.raises(ConfigError, match="is not there"):
        check_nvme(offloading("nvme", tmp_path / "no"), fine, has_gpu=False)


def test_compiled_ops_are_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not is_compiled(ASYNC_IO)
    built = tmp_path / "py311_cpu" / ASYNC_IO
    built.mkdir(parents=True)
    (built / f"{ASYNC_IO}.so").touch()
    assert not is_compiled(ASYNC_IO)
    (built / "build.ninja").write_text("cflags = -I/another/environment/include\n")
    assert not is_compiled(ASYNC_IO)  # ninja would compile it anew for this one
    (built / "build.ninja").write_text(f"cflags = -I{sys.prefix}/include\n")
    os.utime(built / f"{ASYNC_IO}.so", (2e9, 2e9))
    assert is_compiled(ASYNC_IO)
    os.utime(built / f"{ASYNC_IO}.so", (1e9, 1e9))  # it was begun again, and not ended
    assert not is_compiled(ASYNC_IO)
