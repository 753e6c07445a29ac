"""What speaks against a host by itself or beside the others: GPUs, memory, disk, compiled ops, limits."""

from collections.abc import Iterable, Sequence

from mellow_ds.doctor.findings import SLOW, STOPS, Finding
from mellow_ds.doctor.memory import readable
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.preflight.compare import Rule, listed, odd_ones, told, values_of
from mellow_ds.preflight.look import TEMPORARY
from mellow_ds.preflight.survey import HostReport, Survey

_FULL_BYTES = 32 << 20  # below: a compiler or a loader process soon fails
_LITTLE_DISK_BYTES = 2 << 30
_LITTLE_MEMORY = 0.1  # of the host's
_SHARED_MEMORY_BYTES = 256 << 20  # loader processes and NCCL pass data there; containers get 64 MB by default
_BUSY_GPU = 0.05  # of its memory used by somebody else
_OPEN_FILES = 4096  # sockets to each rank, pipes, shards and libraries
_LOCKED_BYTES = 1 << 30  # that InfiniBand registers
_PROCESSES = 4096


def _gpus(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    hosts = told(survey, "gpus")
    for host in hosts:
        gpus = host.facts.gpus
        if gpus.problem:
            yield Finding(
                STOPS, "gpu-driver", f"host {host.name}: the driver's library does not answer: {gpus.problem}",
                "no GPU of the host can be used", "install driver and library of one version there, and restart it",
            )  # fmt: skip
        if gpus.names and len(gpus.names) < host.num_slots:
            yield Finding(
                STOPS, "gpus-below-slots", f"host {host.name} has {len(gpus.names)} GPUs, and {host.num_slots} slots",
                "each rank takes a GPU of its own", f"write slots={len(gpus.names)}, or find out where the others are",
            )  # fmt: skip
        busy = [
            index for index, (used, total) in enumerate(zip(gpus.used_bytes, gpus.total_bytes, strict=False))
            if used > _BUSY_GPU * total
        ]  # fmt: skip
        if busy:
            held = readable(max(gpus.used_bytes[index] for index in busy))
            yield Finding(
                SLOW, "gpu-busy", f"host {host.name}: GPU {', '.join(map(str, busy))} is in use, up to {held}",
                "another program holds its memory, and slows down all ranks", "look with nvidia-smi; end it, or choose "
                "other slots: --include",
            )  # fmt: skip
    with_any = {host.name: bool(host.facts.gpus.names) for host in hosts}
    if len(set(with_any.values())) > 1:
        without = sorted(name for name, has in with_any.items() if not has)
        yield Finding(
            STOPS, "gpus-on-some", f"{listed(without)}: no GPU, while others have some",
            "ranks on GPUs meet over NCCL and others over gloo: they would wait for one another",
            "find out why (lsmod, nvidia-smi), or leave them out: --exclude",
        )  # fmt: skip
        return
    for code, severity, what, values in (
        ("gpu-model", SLOW, "GPUs", {host.name: _models(host) for host in hosts}),
        ("gpu-driver-differs", SLOW, "GPU driver", {host.name: host.facts.gpus.driver for host in hosts}),
    ):
        usual, odd = odd_ones(values)
        if odd:
            yield Finding(
                severity, code, f"{what}: {values_of(odd)}; the others have {usual}",
                "all ranks go as fast as the slowest, and a driver of another version may know other links",
                "group like hosts by --include, or bring the driver to one version",
            )  # fmt: skip


def _models(host: HostReport) -> str:
    return ", ".join(sorted(set(host.facts.gpus.names)))


def _memory(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in told(survey, "memory"):
        memory = host.facts.memory
        if memory.free_bytes < _LITTLE_MEMORY * memory.total_bytes:
            yield Finding(
                SLOW, "memory-low",
                f"host {host.name}: {readable(memory.free_bytes)} of {readable(memory.total_bytes)} memory is free",
                "ranks and loader processes may be killed for it", "look with ps aux --sort=-rss who has it",
            )  # fmt: skip
        if 0 <= memory.shared_bytes < _SHARED_MEMORY_BYTES:
            yield Finding(
                SLOW, "shared-memory-low",
                f"host {host.name}: {readable(memory.shared_bytes)} free in /dev/shm",
                "loader processes and NCCL hand data over there, and die with a bus error where it is full",
                "give the container more (docker run --shm-size=8g, or --ipc=host), or remove what lies there",
            )  # fmt: skip


def _disk(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in survey.reached:
        for folder in host.facts.folders:
            where = f"host {host.name}: the {folder.purpose} folder {folder.path}"
            cure = "remove what is not needed there, or name another: " + _VARIABLE.get(folder.purpose, "--save-dir")
            if folder.problem or folder.free_bytes < _FULL_BYTES:
                why = f" ({folder.problem})" if folder.problem else ""
                yield Finding(
                    STOPS, "disk-full", f"{where} cannot be written, or soon not: {readable(folder.free_bytes)} are "
                    f"free{why}", "a rank that cannot write there fails, and all others with it", cure,
                )  # fmt: skip
            elif folder.free_bytes < _LITTLE_DISK_BYTES:
                yield Finding(
                    SLOW, "disk-low", f"{where} has {readable(folder.free_bytes)} free",
                    "checkpoints, compiled ops and sorted data take gigabytes", cure,
                )  # fmt: skip


_VARIABLE = {TEMPORARY: "TMPDIR in --env-file", "extensions": "TORCH_EXTENSIONS_DIR", "hub": "HF_HOME"}


def _ops(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in told(survey, "ops"):
        ops, on_gpus = host.facts.ops, bool(host.facts.gpus.names)
        if ops.stale_lock:
            what, _, cure = ops.stale_lock.partition(": ")
            yield Finding(
                STOPS if on_gpus else SLOW, "stale-lock", f"host {host.name}: {what}",
                "ops are compiled on first use" + ("" if on_gpus else ", on CPUs only those of an offload to NVMe"),
                cure,
            )  # fmt: skip
        lacking = [tool for tool in ("c++", "ninja", "nvcc") if tool not in ops.tools]
        if on_gpus and lacking:
            yield Finding(
                SLOW, "no-compiler", f"host {host.name}: {', '.join(lacking)} is not there",
                "DeepSpeed's fused optimizers cannot be compiled there; torch's take their place",
                "install g++, ninja and the CUDA toolkit of torch's version",
            )  # fmt: skip


def _limits(survey: Survey, _plan: LaunchPlan) -> Iterable[Finding]:
    for host in told(survey, "limits"):
        limits = host.facts.limits
        if 0 <= limits.open_files < _OPEN_FILES:
            yield Finding(
                SLOW, "open-files", f"host {host.name}: a process may open {limits.open_files} files",
                "connections to all ranks, shards and loader processes count as files", f"ulimit -n {_OPEN_FILES * 16} "
                "in --env-file, or nofile in /etc/security/limits.conf",
            )  # fmt: skip
        if host.facts.gpus.infiniband and 0 <= limits.locked_bytes < _LOCKED_BYTES:
            yield Finding(
                SLOW, "locked-memory", f"host {host.name}: a process may lock {readable(limits.locked_bytes)}",
                "InfiniBand registers its buffers; NCCL fails, or takes the slow network", "memlock unlimited in "
                "/etc/security/limits.conf, and for sshd or slurmd LimitMEMLOCK=infinity",
            )  # fmt: skip
        if 0 <= limits.processes < _PROCESSES:
            yield Finding(
                SLOW, "processes", f"host {host.name}: the user may have {limits.processes} processes and threads",
                "each rank has hundreds of threads", f"ulimit -u {_PROCESSES * 4}, or nproc in "
                "/etc/security/limits.conf",
            )  # fmt: skip
        load, cores = host.facts.system.load, host.facts.system.cores
        if cores and load > cores:
            yield Finding(
                SLOW, "host-busy", f"host {host.name}: {load:.0f} processes want its {cores} cores",
                "all ranks go as fast as the slowest", "look with top who is at work there",
            )  # fmt: skip


MACHINE_RULES: Sequence[Rule] = (_gpus, _disk, _memory, _ops, _limits)
