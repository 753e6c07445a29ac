"""Looking at the host that this runs on, a subject at a time; nothing that takes seconds is imported.

Standard library, and the management library of GPUs where it is there.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from mellow_ds.engine.extension_lock import check_extension_locks, extensions_root
from mellow_ds.errors import ConfigError
from mellow_ds.launcher.environment import choose_variables
from mellow_ds.preflight.facts import (
    FOLDER,
    CodeFacts,
    FolderFacts,
    GpuFacts,
    LimitFacts,
    MemoryFacts,
    NetworkFacts,
    OpsFacts,
    PythonFacts,
    SystemFacts,
)
from mellow_ds.preflight.network import interfaces, name_address

PACKAGES = (
    "torch", "torchaudio", "deepspeed", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "triton", "numpy",
    "soundfile", "webdataset", "safetensors", "tokenizers", "msgspec", "xxhash", "peft", "nvidia-ml-py",
)  # fmt: skip
TORCH_CUDA = "CUDA of torch"  # stands among the packages: wheels of one version are built for several
SHARED, SHARDS, TEMPORARY, EXTENSIONS, HUB = "shared", "shards", "temporary", "extensions", "hub"
_GIT_SECONDS = 5.0
_PROBE_BYTES = 1 << 16  # that a folder has to take: a full disk, or a quota that no count of free bytes tells of
_TOOLS = ("c++", "ninja", "nvcc")
_PLACE = re.compile(r"(PYTHONPATH|MELLOW_PYTHON|MELLOW_ROOT)=")  # differ where a clone stands elsewhere


def look_at_system() -> SystemFacts:
    """Host, user, cores and variables."""
    return SystemFacts(
        hostname=platform.node(),
        boot_id=_text(Path("/proc/sys/kernel/random/boot_id")).strip(),
        kernel=platform.release(),
        user_id=os.getuid(),
        cores=len(os.sched_getaffinity(0)),
        load=round(os.getloadavg()[0], 1),
        variables=tuple(line for line in choose_variables(os.environ).shown() if not _PLACE.match(line)),
    )


def look_at_python() -> PythonFacts:
    """The interpreter and the versions of packages, by what their installers wrote down."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    cuda = _torch_cuda()
    if cuda:
        versions[TORCH_CUDA] = cuda
    return PythonFacts(platform.python_version(), sys.executable, platform.machine(), versions)


def _torch_cuda() -> str:
    """What torch's own file says that it was built for, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return ""
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=]*= '([^']*)'", text, flags=re.MULTILINE)
    return match[1] if match else ""


def look_at_code(root: Path) -> CodeFacts:
    """The clone, or the installed package, at `root`: its commit, and a digest of what Python would read."""
    package = root / "mellow_ds"
    digest = hashlib.sha256()
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.yaml"), *root.glob("train.py")]):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    match = re.search(r'^__version__ = "([^"]+)"', (package / "__init__.py").read_text("utf-8"), flags=re.MULTILINE)
    commit, is_dirty = _commit(root) if (root / ".git").exists() else ("", False)
    return CodeFacts(str(root), match[1] if match else "", commit, is_dirty, digest.hexdigest()[:16])


def _commit(root: Path) -> tuple[str, bool]:
    """(commit, whether files are changed) by git; where git is not there or refuses, by its files."""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is not None:
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".")
        return commit, bool(changed)
    try:
        head = (root / ".git" / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head, False
        return (root / ".git" / head.removeprefix("ref: ")).read_text(encoding="utf-8").strip(), False
    except OSError:
        return "", False


def _git(root: Path, *words: str) -> str | None:
    """What git says; None where it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False, timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def look_at_gpus(proc: Path = Path("/proc/driver/nvidia"), sys_ib: Path = Path("/sys/class/infiniband")) -> GpuFacts:
    """By the management library, else by what the driver writes under /proc."""
    ports = _active_ports(sys_ib)
    problem = ""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return GpuFacts(
            names=tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            total_bytes=tuple(int(one.total) for one in memory),
            used_bytes=tuple(int(one.used) for one in memory),
            infiniband=ports,
        )
    except ImportError:
        pass
    except Exception as error:  # NVMLError, and whatever a library of another version raises
        problem = str(error)
    if not (proc / "version").is_file():
        return GpuFacts(infiniband=ports)
    version = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _text(proc / "version"))
    files = sorted(proc.glob("gpus/*/information"))
    models = [re.search(r"^Model:\s*(.+)$", _text(file), flags=re.MULTILINE) for file in files]
    return GpuFacts(
        names=tuple(model[1].strip() if model else "GPU" for model in models),
        driver=version[1] if version else "",
        infiniband=ports,
        problem=problem,
    )


def _active_ports(folder: Path) -> tuple[str, ...]:
    """`device:port` of InfiniBand or RoCE ports that are up."""
    states = sorted(folder.glob("*/ports/*/state"))
    return tuple(f"{state.parts[-4]}:{state.parts[-2]}" for state in states if "ACTIVE" in _text(state))


def look_at_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> MemoryFacts:
    """Total and free, as a container allows it."""
    read = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE))
    total, free = (int(read.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = _text(cgroup / "memory.max").strip(), _text(cgroup / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    shared = Path("/dev/shm")
    return MemoryFacts(total, max(free, 0), shutil.disk_usage(shared).free if shared.is_dir() else -1)


def look_at_folder(purpose: str, path: Path) -> FolderFacts:
    """Free space of a folder that is there or will be made; those of the host's own are written to.

    Shared ones are, too, but by one host for all (`probe.py`); shards are only read.
    """
    there = next((one for one in (path, *path.absolute().parents) if one.is_dir()), Path("/"))
    manifest = path / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.is_file() else ""
    problem = "" if purpose in (SHARED, SHARDS) else write_problem(there)
    return FolderFacts(purpose, str(path), str(there), _free(there), problem, digest)


def own_folders() -> list[tuple[str, Path]]:
    """(purpose, path) of the folders that each host has for itself: the temporary one, and the caches."""
    hub = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return [
        # not tempfile.gettempdir(), which silently takes another one where this is full
        (TEMPORARY, Path(os.environ.get("TMPDIR") or "/tmp")),
        (EXTENSIONS, extensions_root()),
        (HUB, Path(hub).expanduser()),
    ]


def write_problem(folder: Path) -> str:
    """Why a small file cannot be written in a folder; empty: it can, and is gone again."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\1" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def look_at_network() -> NetworkFacts:
    """Interfaces with their addresses."""
    return NetworkFacts(tuple(interfaces()), name_address())


def look_at_ops() -> OpsFacts:
    """What is in torch's cache of extensions, a lock that nobody holds, and what compiles."""
    root = extensions_root()
    try:
        check_extension_locks()
        lock = ""
    except ConfigError as error:
        lock = str(error)
    libraries: Iterable[Path] = [file for pattern in ("*/*.so", "*/*/*.so") for file in root.glob(pattern)]
    beside = Path(sys.executable).parent  # ninja of an environment that is not on the path
    named = {"c++": os.environ.get("CXX", "c++")}
    tools = [
        tool for tool in _TOOLS
        if shutil.which(named.get(tool, tool)) or shutil.which(tool, path=f"{beside}:/usr/local/cuda/bin")
    ]  # fmt: skip
    return OpsFacts(tuple(sorted({file.stem for file in libraries})), lock, tuple(tools))


def look_at_limits() -> LimitFacts:
    """Of open files, locked memory and processes."""

    def soft(kind: int) -> int:
        limit = resource.getrlimit(kind)[0]
        return -1 if limit == resource.RLIM_INFINITY else limit

    return LimitFacts(soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK), soft(resource.RLIMIT_NPROC))


def looks(root: Path, folders: Sequence[str], shards: Sequence[str] = ()) -> dict[str, Callable[[], object]]:
    """What to call for each subject; each may hang by itself, on a file system or a driver that does.

    The name of a subject begins with its word of `facts.py`; that of a folder goes on with purpose and path.
    """
    named = [*((SHARED, Path(folder)) for folder in folders), *((SHARDS, Path(folder)) for folder in shards)]
    return {
        "system": look_at_system,
        "python": look_at_python,
        "code": partial(look_at_code, root),
        "gpus": look_at_gpus,
        "memory": look_at_memory,
        "network": look_at_network,
        "ops": look_at_ops,
        "limits": look_at_limits,
        **{
            f"{FOLDER} {purpose} {path}": partial(look_at_folder, purpose, path)
            for purpose, path in [*named, *own_folders()]
        },
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
