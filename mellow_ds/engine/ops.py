"""What DeepSpeed compiles on first use, what that needs, and why it would not build here: said before it is tried.

DeepSpeed itself is not imported here; callers hand over its op builders (`deepspeed.ops.op_builder.all_ops.ALL_OPS`).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mellow_ds.ds_config import offload_device, zero_stage
from mellow_ds.engine.extension_lock import extensions_root
from mellow_ds.errors import ConfigError

ASYNC_IO = "async_io"
_CUDA_OPS = ("fused_adam", "fused_lamb")  # compiled by nvcc where there is a GPU
_ADAM_KINDS = ("AdamW", "Adam")
_OFFLOADED = ("offload_optimizer", "offload_param")


def ops_needed(engine_json: dict[str, Any], optimizer_type: str, has_gpu: bool) -> tuple[str, ...]:
    """The ops that a run on DeepSpeed compiles. On CPUs torch's optimizers are taken, and only NVMe needs one."""
    found = []
    if has_gpu and optimizer_type in _ADAM_KINDS:
        found.append("cpu_adam" if offload_device(engine_json, "offload_optimizer") != "none" else "fused_adam")
    if has_gpu and optimizer_type == "Lamb":
        found.append("fused_lamb")
    if any(offload_device(engine_json, what) == "nvme" for what in _OFFLOADED):
        found.append(ASYNC_IO)
    return tuple(found)


def op_problem(name: str, builders: Mapping[str, Any], has_gpu: bool) -> str:
    """Why the op `name` would not build here, with what to do; empty where nothing speaks against it."""
    builder = builders.get(name)
    if builder is None:
        return "DeepSpeed has none for this kind of device"
    if _ninja() is None:
        return "ninja, which compiles it, is not there: pip install ninja"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler: install g++, or name one in CXX"
    if has_gpu and name in _CUDA_OPS and (problem := _nvcc_problem()):
        return problem
    try:
        fits = bool(builder.is_compatible(False))
    except Exception as error:  # builders raise one of many kinds where a toolkit is missing
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if fits:
        return ""
    if name == ASYNC_IO:
        return "libaio and its header are not found: apt-get install libaio-dev, or set CFLAGS and LDFLAGS"
    return "DeepSpeed finds it incompatible with this machine: run ds_report"


def is_compiled(name: str) -> bool:
    """Whether an earlier run in this environment compiled the op; in another one it would be compiled anew."""
    root = extensions_root()
    built = (so for pattern in (f"{name}/{name}.so", f"*/{name}/{name}.so") for so in root.glob(pattern))
    return any(_is_whole_and_ours(so, so.with_name("build.ninja")) for so in built)


def _is_whole_and_ours(library: Path, recipe: Path) -> bool:
    """Whether ninja's file names the headers of the torch that runs here, and the library came after it: a compilation
    that was interrupted leaves that of the one before."""
    try:
        is_ours = str(Path(sys.prefix)) in recipe.read_text(encoding="utf-8", errors="replace")
        return is_ours and library.stat().st_mtime >= recipe.stat().st_mtime
    except OSError:
        return False


def check_nvme(engine_json: dict[str, Any], builders: Mapping[str, Any], has_gpu: bool) -> None:
    """Raise `ConfigError` where the JSON offloads to NVMe and that cannot work here."""
    if problem := nvme_problem(engine_json):
        raise ConfigError(problem)
    if ASYNC_IO in ops_needed(engine_json, "", has_gpu) and (problem := op_problem(ASYNC_IO, builders, has_gpu)):
        raise ConfigError(f"the engine JSON offloads to nvme, for which DeepSpeed compiles {ASYNC_IO}: {problem}")


def nvme_problem(engine_json: dict[str, Any]) -> str:
    """What is wrong with the folders and the stage of an offload to NVMe; empty where nothing is, or none is wanted."""
    for what in _OFFLOADED:
        if offload_device(engine_json, what) != "nvme":
            continue
        key = f"zero_optimization.{what}"
        if (stage := zero_stage(engine_json)) != 3:
            return f"{key}.device is nvme in the engine JSON at stage {stage}: only stage 3 does that; take cpu"
        path = engine_json["zero_optimization"][what].get("nvme_path")
        if not path:
            return f"{key}.nvme_path is missing in the engine JSON: name a folder on a local NVMe disk"
        if not Path(path).is_dir():
            return f"{key}.nvme_path {path} is not there: make it on a local NVMe disk, or correct the engine JSON"
        if not os.access(path, os.W_OK | os.X_OK):
            return f"{key}.nvme_path {path} cannot be written to: give the run's user the right, or take another folder"
    return ""


def _ninja() -> str | None:
    """The ninja on the path, or the one of this environment, whose folder is not on the path of every launcher."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def _nvcc_problem() -> str:
    """Why CUDA sources would not compile for this torch; empty where nothing is known to be wrong."""
    import torch

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return "there is no CUDA compiler (nvcc): install the CUDA toolkit, and name its folder in CUDA_HOME"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    wanted = torch.version.cuda or ""
    if found is None or found.group(1) != wanted.partition(".")[0]:
        has = ".".join(found.groups()) if found else "an unknown version"
        return f"{nvcc} is of CUDA {has}, but torch was built with {wanted}: install the toolkit of the same version"
    return ""
