"""What stops a script of launch/ on one host reaches the ranks, which save, and their exit code comes back."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.monitor.process_id import descendants
from tests.cli.runs import ROOT, environment
from tests.ranks import free_port

pytestmark = pytest.mark.slow
SECONDS = 30


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This clone as the scripts see it, with a train.py that is quick to start."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("mellow_ds", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "tests" / "cluster" / "stand_in.py", folder / "train.py")
    return folder


@contextlib.contextmanager
def at_work(clone: Path, name: str, sign: str = "at work", count: int = 2) -> Iterator["subprocess.Popen[str]"]:
    """A script with two ranks, both of them at work; or until it has shown another `sign`."""
    words = ["--num-per-host", "2", "--config", "quickstart"]
    environ = environment(MELLOW_VENV=sys.prefix, MELLOW_PORT=str(free_port()))
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    if name == "ssh/torchrun_node.sh":
        words += ["--master", f"127.0.0.1:{environ['MELLOW_PORT']}"]
    said = clone / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [str(clone / "launch" / name), *words], cwd=clone, env=environ, stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, text=True, start_new_session=True,
        )  # fmt: skip
        started = []
        try:
            deadline = time.monotonic() + 120
            while said.read_text().count(sign) < count:
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
            started = descendants(process.pid)
            yield process
            deadline = time.monotonic() + SECONDS
            while any(one.state() == "runs" for one in started):
                assert time.monotonic() < deadline, "a process of the run is left"
                time.sleep(0.1)
        finally:
            for one in started:
                one.kill()
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("deepspeed/single_node.sh", signal.SIGINT, 130), ("ssh/torchrun_node.sh", signal.SIGUSR1, 85)],
)
def test_a_stop_is_saved_and_told(clone: Path, name: str, number: signal.Signals, code: int) -> None:
    """Ctrl-C as a terminal has it, to the whole process group; what a scheduler sends, to the script alone."""
    with at_work(clone, name) as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(SECONDS) == code
        assert (clone / "said").read_text().count("saved") == 2


def test_a_stop_before_there_are_ranks_is_kept_for_them(clone: Path) -> None:
    """The launcher imports for seconds before it starts them, and would start them for nobody."""
    with at_work(clone, "deepspeed/single_node.sh", "real_accelerator.py", count=1) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) != 0
        said = (clone / "said").read_text()
        assert said.count("SIGTERM: every rank is told") == 1
        assert "sage:" not in said  # of pkill


@pytest.mark.parametrize("name", ["deepspeed/single_node.sh", "ssh/torchrun_node.sh"])
def test_a_rank_that_is_killed_is_told(clone: Path, name: str) -> None:
    with at_work(clone, name) as process:
        victims = [one for one in descendants(process.pid) if b"train.py" in words_of(one.pid).split(b"\0")[1:3]]
        assert len(victims) == 2
        os.kill(victims[1].pid, signal.SIGKILL)
        assert process.wait(SECONDS) == 137


def test_ranks_of_one_host_end_with_the_deepspeed_command(clone: Path) -> None:
    """Killed with no chance to tell anybody; the script is not needed for it."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), "train.py"]
    said = clone / "said"
    with said.open("wb") as file:
        runner = subprocess.Popen(command, cwd=clone, env=environment(), stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while said.read_text().count("at work") < 2:
        assert runner.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    started = descendants(runner.pid)
    runner.kill()
    runner.wait()
    try:
        deadline = time.monotonic() + SECONDS
        while any(one.state() == "runs" for one in started):
            assert time.monotonic() < deadline, "a process of the run is left"
            time.sleep(0.1)
        assert said.read_text().count("saved") == 2
    finally:
        for one in started:
            one.kill()


def words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
