"""Locks of torch's extension builder, taken by torch's own code, with and without a process that holds them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.engine import extension_lock
from mellow_ds.engine.extension_lock import check_extension_locks, extensions_root
from mellow_ds.errors import ConfigError
from tests.guide import quoted

COMPILER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("compiling", flush=True)
time.sleep(60)
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The build folder of one extension in a cache."""
    folder = tmp_path / "py311_cu128" / "fused_adam"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def compiler(build: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock as torch does while it compiles."""
    process = subprocess.Popen([sys.executable, "-c", COMPILER, build / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache on a file system that other hosts see too."""
    monkeypatch.setattr(extension_lock, "_is_shared", lambda _: True)


def test_no_cache_and_an_empty_one_are_well(tmp_path: Path, build: Path) -> None:
    check_extension_locks(tmp_path / "not there")
    (build / "fused_adam.so").write_bytes(b"compiled")
    check_extension_locks(tmp_path)


def test_a_stale_lock_is_named_within_seconds(tmp_path: Path, build: Path) -> None:
    """Case 29; also where TORCH_EXTENSIONS_DIR names the folder, which then has no level for the versions."""
    (build / "lock").touch()
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check_extension_locks(tmp_path)
    assert time.monotonic() - started < 10
    assert f"remove {tmp_path / 'cpu_adam' / 'lock'} {build / 'lock'} (" in str(caught.value)
    assert str(caught.value).startswith(quoted("a compilation that was killed left its lock"))


@pytest.mark.slow
def test_a_lock_is_good_while_its_process_compiles_and_stale_once_that_is_killed(
    tmp_path: Path, build: Path, compiler: subprocess.Popen[str]
) -> None:
    check_extension_locks(tmp_path)
    compiler.kill()
    compiler.wait()
    assert (build / "lock").exists()
    with pytest.raises(ConfigError, match="fused_adam/lock"):
        check_extension_locks(tmp_path)


def test_a_lock_that_is_let_go_of_just_now_is_well(tmp_path: Path, build: Path) -> None:
    (build / "lock").touch()
    timer = threading.Timer(1.0, (build / "lock").unlink)
    timer.start()
    check_extension_locks(tmp_path)
    timer.join()


@pytest.mark.usefixtures("_shared")
def test_a_lock_that_another_host_may_hold_is_stale_once_nothing_has_changed_for_long(
    tmp_path: Path, build: Path
) -> None:
    (build / "lock").touch()
    (build / "main.o").touch()
    check_extension_locks(tmp_path)
    for path in build.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    with pytest.raises(ConfigError, match="fused_adam/lock"):
        check_extension_locks(tmp_path)


def test_the_cache_is_where_torch_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "given"))
    assert Path(_get_build_directory("x", False)).parent == extensions_root() == tmp_path / "given"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(_get_build_directory("x", False)).parent.parent == extensions_root()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(_get_build_directory("x", False)).parent.parent == extensions_root()
