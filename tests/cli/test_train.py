"""The commands as people run them: train on two ranks, stop, resume, damage, evaluate, generate, report."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.checkpoint.step_folder import MODEL
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import ROOT, TINY, by_deepspeed, by_torchrun, environment, forked, launched, started
from tests.guide import quoted

pytestmark = pytest.mark.slow


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


def weights_of(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model, from however many files."""
    with TensorFiles(step, MODEL) as tensors:
        return {name: tensors.read(name).clone() for name in tensors.names()}


def test_a_run_leaves_what_the_readme_says(straight: Path) -> None:
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "tokenizer"):
        assert (straight / name).exists()
    assert list((straight / "tensorboard").glob("events.*"))
    assert len(losses(straight)) == 6
    verify_checkpoint(straight / "checkpoints" / "step-000006")


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_evaluation_where_weights_are_sharded(shards: Path, tmp_path: Path, engine: str) -> None:
    """Three examples on two ranks: one has a batch to answer that the other has not, and answers differ in length.

    Ranks make their passes together, or each with all the weights as it likes: the answers are the same.
    """
    sharded = tmp_path / "zero3.json"
    sharded.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    arguments = [
        "--config", "quickstart", "--data.shards", shards / "train", "--data.eval_shards", shards / "test", *TINY,
        "--train.evaluate_at_end", "true", "--evaluation.batch_size", 1, "--evaluation.max_examples", 3,
        "--train.max_steps", 3, "--engine", engine, "--deepspeed_config", sharded, "--save-dir", tmp_path / "run",
        "--train.evaluate_every_steps", 2,
    ]  # fmt: skip
    answers = []
    for gather_weights in ("false", "true"):  # the second start finds a finished run
        ranks = forked("train.py", *arguments, "--evaluation.gather_weights", gather_weights, num_ranks=2)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:] + ranks[1].stderr[-3000:]
        assert ("each token gathers the weights" in ranks[0].stderr) == (gather_weights == "false")
        assert json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["num_examples"] == 3
        answers.append((tmp_path / "run" / "evaluation" / "predictions.jsonl").read_text())
    assert answers[0] == answers[1]


def test_stopped_and_resumed_is_the_same_run_bit_for_bit(straight: Path, shards: Path, tmp_path: Path) -> None:
    """Dropout is on, so the random states must come back; the second start takes another launcher and ZeRO stage."""
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY]
    for first in forked("train.py", *arguments, "--train.stop_at_step", 4, num_ranks=2):
        assert first.returncode == 0, first.stderr[-3000:]
    second = launched(by_torchrun(*arguments, "--deepspeed_config", "ds_configs/zero1.json"))
    assert second.returncode == 0, second.stderr[-3000:]
    assert "going on from" in second.stderr
    assert losses(tmp_path) == losses(straight)
    ours = weights_of(tmp_path / "checkpoints" / "step-000006")
    theirs = weights_of(straight / "checkpoints" / "step-000006")
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_a_damaged_step_is_passed_over_and_a_single_rank_goes_on(straight: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = run / "checkpoints" / "step-000006" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY]
    (result,) = forked("train.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "optimizer-00002-of-00002.safetensors is damaged" in result.stderr
    assert "going on from" in result.stderr
    assert "step-000003" in result.stderr
    assert len(losses(run)) == 6  # steps 4 to 6 stand once, those of the new run
    verify_checkpoint(run / "checkpoints" / "step-000006")


def test_evaluate_generate_and_report(straight: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    checkpoint = run / "checkpoints" / "step-000006"
    evaluated = forked(
        "train.py", "--mode", "evaluate_checkpoint", "--checkpoint_path", checkpoint, "--config", "quickstart",
        "--data.eval_shards", shards / "test", "--save-dir", run, *TINY, num_ranks=2,
    )  # fmt: skip
    assert [rank.returncode for rank in evaluated] == [0, 0], evaluated[0].stderr[-3000:]
    assert "event-open" in evaluated[0].stdout
    assert evaluated[1].stdout == ""
    out = run / "evaluation" / "step-000006"
    results = json.loads((out / "results.json").read_text())
    num_questions = json.loads((shards / "test" / "manifest.json").read_text())["num_questions"]
    assert results["num_examples"] == results["silenced"]["num_examples"] == num_questions
    ids = [json.loads(line)["id"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(set(ids)) == num_questions
    audio = next((shards / "corpus" / "audio" / "test").iterdir())
    question = ["--prompt", "what sound is heard?", "--max-new-tokens", 4]
    (answered,) = forked("mellow-ds", "generate", "--checkpoint", checkpoint, "--audio", audio, *question)
    assert answered.returncode == 0, answered.stderr[-3000:]
    assert answered.stdout.count("\n") == 1
    (report,) = forked("mellow-ds", "report", run)
    assert report.returncode == 0
    assert "event-open" in report.stdout
    assert "silenced" in report.stdout
    # six steps teach nothing: the quickstart must notice
    assert forked("mellow-ds", "report", run, "--require-hearing")[0].returncode == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(number: int, code: int, shards: Path, tmp_path: Path) -> None:
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY]
    with started("train.py", *arguments, "--train.max_steps", 100_000) as (process,):
        process.wait_for(lambda: wrote(tmp_path / "metrics.jsonl"))
        os.kill(process.pid, number)
        done = process.end(time.monotonic() + 60)
    assert done.returncode == code, done.stderr[-3000:]
    steps = sorted((tmp_path / "checkpoints").glob("step-*"))
    verify_checkpoint(steps[-1])
    state = json.loads((steps[-1] / "state.json").read_text())
    assert steps[-1].name == f"step-{state['progress']['step']:06d}"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == state["progress"]["step"]


def wrote(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def test_a_full_disk_during_a_save_keeps_the_step_before(straight: Path, shards: Path, tmp_path: Path) -> None:
    """A file system that one and a half of our checkpoints fit."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can only be mounted as root")
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    files = (straight / "checkpoints" / "step-000003").iterdir()
    step_bytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)  # tmpfs counts pages
    size = int(step_bytes * 1.6)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY]
        (result,) = forked("train.py", *arguments)
        assert result.returncode == 1, result.stderr[-3000:]  # the last save of a run must succeed
        line = result.stderr.strip().splitlines()[-1]
        assert "step-000006 was not saved: the disk is full" in line
        assert re.search(r"it takes [\d.]+ MB, [\d.]+ MB are free; step-000003 stays loadable", line)
        assert "Traceback" not in result.stderr
        assert [path.name for path in disk.iterdir()] == ["step-000003"]  # what was begun is removed
        verify_checkpoint(disk / "step-000003")
        # one in the middle of a run is told and tried again when the next is due, which has room
        longer = [*arguments, "--train.max_steps", 9, "--train.stop_at_step", 7]
        (result,) = forked("train.py", *longer)
        assert result.returncode == 1, result.stderr[-3000:]
        assert "step-000006 " + quoted("was not saved: the disk is full") in result.stderr
        assert "; the run goes on" in result.stderr
        assert "step-000007 was not saved" in result.stderr.strip().splitlines()[-1]
        failed = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r.get("name") == "save_failed"]
        assert failed == [6, 7]
        # and with room again, the same command goes on from what there is
        subprocess.run(["mount", "-o", f"remount,size={3 * size}", disk], check=True)
        (again,) = forked("train.py", *arguments)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "going on from" in again.stderr
        assert "step-000003" in again.stderr
        assert len(losses(run)) == 6
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ranks_end_when_their_launcher_is_killed(shards: Path, tmp_path: Path) -> None:
    """SIGKILL of DeepSpeed's `launch` process: the kernel tells the ranks, which save and leave."""
    arguments = by_deepspeed(
        "--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path, *TINY,
        "--train.max_steps", 100000,
    )  # fmt: skip
    runner = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not wrote(tmp_path / "metrics.jsonl"):
            assert runner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
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
