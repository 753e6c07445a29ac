"""What a host tells about itself: against other programs that know, and against files of hosts that are not here."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from mellow_ds.preflight import look
from mellow_ds.preflight.facts import FOLDER, HostFacts, InterfaceFacts, PythonFacts, as_message


def test_versions_are_those_of_the_imported_packages() -> None:
    python = look.look_at_python()
    assert python.packages["torch"] == torch.__version__.partition("+")[0]
    assert python.packages.get(look.TORCH_CUDA) == torch.version.cuda
    assert python.packages["numpy"] == np.__version__
    assert python.version == ".".join(map(str, sys.version_info[:3]))


def test_looking_imports_nothing_that_takes_seconds() -> None:
    code = (
        "import sys; from pathlib import Path; from mellow_ds.preflight.look import looks; "
        "[look() for look in looks(Path.cwd(), ['/tmp']).values()]; "
        "sys.exit(1 if {'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules) else 0)"
    )
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A committed clone of two files."""
    (tmp_path / "mellow_ds").mkdir()
    (tmp_path / "mellow_ds" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    (tmp_path / "train.py").write_text("print()\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    return tmp_path


def test_the_commit_and_what_is_changed(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True).stdout.strip()
    clean = look.look_at_code(clone)
    assert (clean.commit, clean.is_dirty, clean.version) == (head, False, "9.9.9")
    (clone / "notes.txt").write_text("what git does not know is nobody's code")
    (clone / "mellow_ds" / "__pycache__").mkdir()
    assert look.look_at_code(clone) == clean
    (clone / "train.py").write_text("print(1)\n")
    changed = look.look_at_code(clone)
    assert (changed.commit, changed.is_dirty) == (head, True)
    assert changed.digest != clean.digest
    # a host without git knows the commit too
    monkeypatch.setattr(look, "_git", lambda *_: None)
    assert look.look_at_code(clone).commit == head
    # and without a clone there is still the digest
    shutil.rmtree(clone / ".git")
    assert (look.look_at_code(clone).commit, look.look_at_code(clone).digest) == ("", changed.digest)


def test_gpus_by_the_drivers_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    for slot, model in (("0000:01:00.0", "NVIDIA H100 80GB HBM3"), ("0000:02:00.0", "NVIDIA H100 80GB HBM3")):
        (tmp_path / "gpus" / slot).mkdir(parents=True)
        (tmp_path / "gpus" / slot / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 33\n")
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (x)"
    (tmp_path / "version").write_text(f"{said}\nGCC version:  gcc 12\n")
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    off = tmp_path / "infiniband" / "mlx5_1" / "ports" / "1"
    off.mkdir(parents=True)
    (off / "state").write_text("1: DOWN\n")
    gpus = look.look_at_gpus(tmp_path, tmp_path / "infiniband")
    assert gpus.names == ("NVIDIA H100 80GB HBM3",) * 2
    assert gpus.driver == "570.124.06"
    assert gpus.infiniband == ("mlx5_0:1",)
    assert look.look_at_gpus(tmp_path / "none", tmp_path / "none") == look.GpuFacts()


class _Library:
    """The management library with two devices, as nvidia-ml-py 13 answers; or with a driver of another version."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def nvmlInit(self) -> None:
        if self._error:
            raise RuntimeError(self._error)

    def __getattr__(self, name: str) -> object:
        memory = types.SimpleNamespace(total=80, used=3)
        return {
            "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda _: memory, "nvmlDeviceGetName": lambda index: f"GPU {index}",
            "nvmlSystemGetDriverVersion": lambda: "570.1",
        }[name]  # fmt: skip


def test_gpus_by_the_management_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Library())
    gpus = look.look_at_gpus(tmp_path, tmp_path)
    assert (gpus.names, gpus.driver, gpus.total_bytes, gpus.used_bytes) == (
        ("GPU 0", "GPU 1"),
        "570.1",
        (80, 80),
        (3, 3),
    )
    # a driver that the library does not fit is a fault where there is a driver, and nothing where there is none
    monkeypatch.setitem(sys.modules, "pynvml", _Library("Driver/library version mismatch"))
    assert look.look_at_gpus(tmp_path, tmp_path).problem == ""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\n")
    broken = look.look_at_gpus(tmp_path, tmp_path)
    assert (broken.problem, broken.driver) == ("Driver/library version mismatch", "535.54.03")


def test_a_container_has_what_its_group_allows(tmp_path: Path) -> None:
    whole = look.look_at_memory(tmp_path)
    assert whole.total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert (look.look_at_memory(tmp_path).total_bytes, look.look_at_memory(tmp_path).free_bytes) == (1_000_000, 600_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert look.look_at_memory(tmp_path).total_bytes == whole.total_bytes


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    shards = look.look_at_folder(look.SHARED, tmp_path)
    assert shards.digest
    assert shards.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    missing = look.look_at_folder(look.TEMPORARY, tmp_path / "a" / "b")
    assert (missing.there, missing.problem, missing.digest) == (str(tmp_path), "", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]
    assert "o such file" in look.write_problem(tmp_path / "gone")


def test_what_a_host_of_another_commit_tells_is_taken_as_far_as_it_is_known() -> None:
    facts = HostFacts().with_subject("python", {"version": "3.12.1", "made_up_since": 1})
    assert facts.python == PythonFacts("3.12.1")
    assert facts.with_subject("made up", {}) is facts
    assert facts.with_subject("python", "no dict") is facts
    both = facts.with_subject(FOLDER, {"purpose": "shared", "path": "/a"}).with_subject(FOLDER, {"path": "/b"})
    assert [one.path for one in both.folders] == ["/a", "/b"]


def test_facts_come_over_the_wire_as_they_were() -> None:
    import json

    network = look.look_at_network()
    told = json.loads(json.dumps(as_message(network)))
    assert HostFacts().with_subject("network", told).network == network
    assert all(isinstance(one, InterfaceFacts) for one in network.interfaces)
