"""The commands as people run them: train on two ranks, stop, resume, damage, evaluate, generate, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from mellow_ds.checkpoint import verify_checkpoint
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import ROOT, TINY, environment, two_ranks, two_ranks_by_torchrun

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.slow


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two ranks, ZeRO-2, that nothing disturbed."""
    run = tmp_path_factory.mktemp("straight")
    result = subprocess.run(
        [sys.executable, *two_ranks("--config", "quickstart", "--deepspeed_config", "ds_configs/zero2.json",
         "--data.shards", shards / "train", "--save-dir", run, *TINY)],
        capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def test_a_run_leaves_what_the_readme_says(straight: Path) -> None:
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "tokenizer"):
        assert (straight / name).exists()
    assert list((straight / "tensorboard").glob("events.*"))
    assert len(losses(straight)) == 6
    verify_checkpoint(straight / "checkpoints" / "step-000006")


def test_stopped_and_resumed_is_the_same_run_bit_for_bit(
    straight: Path, shards: Path, tmp_path: Path, command: Run
) -> None:
    """Dropout is on, so the random states must come back; the second start takes another launcher and ZeRO stage."""
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY]
    first = command(*two_ranks(*arguments, "--train.stop_at_step", 4))
    assert first.returncode == 0, first.stderr[-3000:]
    second = command(*two_ranks_by_torchrun(*arguments, "--deepspeed_config", "ds_configs/zero1.json"))
    assert second.returncode == 0, second.stderr[-3000:]
    assert "going on from" in second.stderr
    assert losses(tmp_path) == losses(straight)
    ours = load_file(tmp_path / "checkpoints" / "step-000006" / "model.safetensors")
    theirs = load_file(straight / "checkpoints" / "step-000006" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_a_damaged_step_is_passed_over_and_a_single_rank_goes_on(
    straight: Path, shards: Path, tmp_path: Path, command: Run
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = run / "checkpoints" / "step-000006" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = command("train.py", "--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "optimizer.safetensors is damaged" in result.stderr
    assert "going on from" in result.stderr
    assert "step-000003" in result.stderr
    assert len(losses(run)) == 6  # steps 4 to 6 stand once, those of the new run
    verify_checkpoint(run / "checkpoints" / "step-000006")


def test_evaluate_generate_and_report(straight: Path, shards: Path, command: Run) -> None:
    checkpoint = straight / "checkpoints" / "step-000006"
    result = command(
        *two_ranks("--mode", "evaluate_checkpoint", "--checkpoint_path", checkpoint, "--config", "quickstart",
                   "--data.eval_shards", shards / "test", "--save-dir", straight, *TINY)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    out = straight / "evaluation" / "step-000006"
    results = json.loads((out / "results.json").read_text())
    num_questions = json.loads((shards / "test" / "manifest.json").read_text())["num_questions"]
    assert results["num_examples"] == results["silenced"]["num_examples"] == num_questions
    ids = [json.loads(line)["id"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(set(ids)) == num_questions
    audio = next((shards / "corpus" / "audio" / "test").iterdir())
    answered = command(
        "-m", "mellow_ds.cli.main", "generate", "--checkpoint", checkpoint, "--audio", audio,
        "--prompt", "what sound is heard?", "--max-new-tokens", 4,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr[-3000:]
    assert answered.stdout.count("\n") == 1
    report = command("-m", "mellow_ds.cli.main", "report", straight)
    assert report.returncode == 0
    assert "event-open" in report.stdout
    assert "silenced" in report.stdout
    # six steps teach nothing: the quickstart must notice
    assert command("-m", "mellow_ds.cli.main", "report", straight, "--require-hearing").returncode == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(number: int, code: int, shards: Path, tmp_path: Path) -> None:
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY]
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments), "--train.max_steps", "100000"],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _wait_for(tmp_path / "metrics.jsonl", process)
        os.kill(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr[-3000:]
    steps = sorted((tmp_path / "checkpoints").glob("step-*"))
    verify_checkpoint(steps[-1])
    state = json.loads((steps[-1] / "state.json").read_text())
    assert steps[-1].name == f"step-{state['progress']['step']:06d}"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == state["progress"]["step"]


def test_a_full_disk_during_a_save_keeps_the_step_before(straight: Path, shards: Path, tmp_path: Path) -> None:
    """A file system that one and a half of our checkpoints fit."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can only be mounted as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    files = (straight / "checkpoints" / "step-000003").iterdir()
    step_bytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)  # tmpfs counts pages
    size = int(step_bytes * 1.6)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        result = subprocess.run(
            [sys.executable, "train.py", "--config", "quickstart", "--data.shards", shards / "train",
             "--save-dir", tmp_path / "run", *TINY],
            capture_output=True, text=True, timeout=400, cwd=ROOT, check=False,
            env=environment(), preexec_fn=lambda: _link(tmp_path / "run", disk),
        )  # fmt: skip
        assert result.returncode == 2, result.stderr[-3000:]
        line = result.stderr.strip().splitlines()[-1]
        assert "step-000006 was not saved: the disk is full" in line
        assert "step-000003 stays loadable" in line
        assert "Traceback" not in result.stderr
        assert [path.name for path in disk.iterdir()] == ["step-000003"]  # what was begun is removed
        verify_checkpoint(disk / "step-000003")
    finally:
        subprocess.run(["umount", disk], check=True)


def _link(run: Path, disk: Path) -> None:
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.2)


def test_ranks_end_when_their_launcher_is_killed(shards: Path, tmp_path: Path) -> None:
    """SIGKILL of DeepSpeed's `launch` process: the kernel tells the ranks, which save and leave."""
    arguments = two_ranks(
        "--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY,
        "--train.max_steps", 100000,
    )  # fmt: skip
    runner = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        _wait_for(tmp_path / "metrics.jsonl", runner)
        (launch,) = psutil.Process(runner.pid).children()
        ranks = [p for p in launch.children() if "train.py" in p.cmdline()]
        family = [launch, *launch.children(recursive=True)]
        assert len(ranks) == 2
        launch.kill()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        runner.kill()
        runner.wait()
    verify_checkpoint(sorted((tmp_path / "checkpoints").glob("step-*"))[-1])


def test_another_model_shape_is_refused_in_one_line(straight: Path, shards: Path, tmp_path: Path, command: Run) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY]
    result = command("train.py", *arguments, "--model.decoder.intermediate_size", 32)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "is of another model shape: decoder.model.layers.0.mlp" in errors[0]
    assert "Traceback" not in result.stderr
