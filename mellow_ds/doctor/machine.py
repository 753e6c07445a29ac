"""Looking at the machine: GPUs, memory, cores, disk, and what DeepSpeed could compile here."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mellow_ds.config.schema import RunConfig
from mellow_ds.doctor.facts import Machine
from mellow_ds.doctor.memory import GIGABYTE
from mellow_ds.engine.extension_lock import check_extension_locks
from mellow_ds.engine.ops import is_compiled, op_problem, ops_needed
from mellow_ds.errors import ConfigError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"
_FIRST_HALF_CAPABILITY = (5, 3)  # CUDA devices before compute no float16 (CUDA programming guide)


def look_at_machine(
    config: RunConfig, engine_json: dict[str, Any], world: int = 0, gpu_gigabytes: float = 0.0
) -> Machine:
    """This machine, for `world` ranks (0: as many as it has GPUs, else 1) with `gpu_gigabytes` each (0: what is there).

    Memory of GPUs given where none are seen means that they are elsewhere.
    """
    num_gpus = torch.cuda.device_count() if config.distributed_backend != "gloo" else 0
    world = world or max(num_gpus, 1)
    is_remote = not num_gpus and gpu_gigabytes > 0
    ranks_per_host = min(world, num_gpus or world)
    host_memory = _host_memory()
    memory = round(gpu_gigabytes * GIGABYTE)
    if not memory:
        memory = torch.cuda.get_device_properties(0).total_memory if num_gpus else host_memory // ranks_per_host
    engine, deepspeed_problem = _deepspeed_engine(config)
    problems = {} if engine is None or is_remote else _op_problems(engine, config, engine_json, num_gpus > 0)
    return Machine(
        world=world,
        ranks_per_host=ranks_per_host,
        num_gpus=num_gpus,
        gpu_name=torch.cuda.get_device_name(0) if num_gpus else "",
        is_remote=is_remote,
        memory_bytes=memory,
        host_memory_bytes=host_memory,
        num_cores=len(os.sched_getaffinity(0)),
        has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False) if num_gpus else True,
        has_float16=_has_float16(num_gpus, is_remote, engine),
        free_disk_bytes=_free_disk(Path(config.save_dir)),
        deepspeed_problem=deepspeed_problem,
        op_problems=problems,
        compiled_ops=frozenset(name for name in problems if is_compiled(name)),
        stale_locks=_stale_locks(),
    )


def _host_memory() -> int:
    """Bytes of this host, or of the container that this is."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or will be made."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path.cwd())
    return shutil.disk_usage(there).free


def _deepspeed_engine(config: RunConfig) -> tuple[Any, str]:
    """(the module of the back end, "") or (None, why it cannot be imported); (None, "") where it is not asked for."""
    if config.engine == "fsdp":
        return None, ""
    try:
        from mellow_ds.engine import deepspeed_engine
    except Exception as error:  # a broken installation raises more than ImportError
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]
    return deepspeed_engine, ""


def _has_float16(num_gpus: int, is_remote: bool, engine: Any) -> bool:
    if num_gpus:
        return torch.cuda.get_device_capability(0) >= _FIRST_HALF_CAPABILITY
    if is_remote or engine is None:
        return True
    return bool(engine.deepspeed.accelerator.get_accelerator().is_fp16_supported())


def _op_problems(engine: Any, config: RunConfig, engine_json: dict[str, Any], has_gpu: bool) -> dict[str, str]:
    needed = ops_needed(engine_json, config.train.optimizer_type, has_gpu)
    if not needed:
        return {}
    deepspeed = engine.deepspeed  # which one file alone imports
    assert deepspeed.ops.__compatible_ops__ is not None, "looking at them loads the builders"
    builders = deepspeed.ops.op_builder.all_ops.ALL_OPS
    return {name: op_problem(name, builders, has_gpu) for name in needed}


def _stale_locks() -> tuple[str, ...]:
    try:
        check_extension_locks()
    except ConfigError as error:
        return (str(error),)
    return ()
