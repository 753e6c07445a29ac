"""Checkpoints of whole runs in trouble: read-only disks, stops at odd moments, budgets, foreign files."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.cli.model_folder import load_model_folder
from mellow_ds.errors import CheckpointError
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import TINY, forked, started

pytestmark = pytest.mark.slow


def training(shards: Path, run: Path, *more: object) -> list[object]:
    return ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY, *more]


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record.get("name") == name]


def test_a_read_only_disk_is_named_and_the_newest_step_stays(straight: Path, shards: Path, tmp_path: Path) -> None:
    """Root may write anywhere but into a file system that is mounted so. A foreign `latest` lies beside the steps."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system can only be mounted as root")
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        shutil.copytree(straight / "checkpoints" / "step-000003", disk / "step-000003")
        (disk / "latest").write_text("global_step77")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for done in forked("train.py", *training(shards, run), num_ranks=2):
            assert done.returncode == 1, done.stderr[-3000:]
            assert "step-000006 was not saved: rank 0: the file system is read-only" in done.stderr
            assert "step-000003 stays loadable" in done.stderr
            assert "Traceback" not in done.stderr
        assert sorted(path.name for path in disk.iterdir()) == ["latest", "step-000003"]
        (done,) = forked("train.py", *training(shards, disk / "runs" / "new"))  # and a run folder on it
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: save_dir {disk}/runs/new cannot be written: {disk} is ")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_steps_that_lack_a_rank_s_file_or_have_it_empty_are_passed_over(
    straight: Path, shards: Path, tmp_path: Path
) -> None:
    """Case 23, on two ranks: each of them finds one of the two."""
    run, steps = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(straight, run)
    shutil.copytree(steps / "step-000006", steps / "step-000008")
    (steps / "step-000008" / "model-00002-of-00002.safetensors").unlink()
    os.truncate(steps / "step-000006" / "optimizer-00001-of-00002.safetensors", 0)
    first, second = forked("train.py", *training(shards, run), num_ranks=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    warned = [line for line in first.stderr.splitlines() if "trying the step before it" in line]
    assert "step-000008/model-00002-of-00002.safetensors is missing" in warned[0]
    assert "step-000006/optimizer-00001-of-00002.safetensors has 0 bytes" in warned[1]
    assert f"going on from {steps / 'step-000003'}" in first.stderr
    verify_checkpoint(steps / "step-000006")  # as it was saved again
    losses = [
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]
        for folder in (run, straight)
    ]
    assert losses[0] == losses[1]


def test_a_named_step_without_its_list_of_files_is_refused(straight: Path, shards: Path, tmp_path: Path) -> None:
    """Nothing could say whether the rest of it is whole."""
    step = tmp_path / "step-000006"
    shutil.copytree(straight / "checkpoints" / step.name, step)
    (step / "files.json").unlink()
    (started_from,) = forked("train.py", *training(shards, tmp_path / "run", "--resume_checkpoint", step))
    assert started_from.returncode == 2, started_from.stderr[-3000:]
    assert f"{step} has no readable files.json" in started_from.stderr.splitlines()[-1]
    with pytest.raises(CheckpointError, match=r"no readable files\.json"):
        load_model_folder(step, "cpu")


def test_a_signal_before_the_first_step_ends_with_its_code(shards: Path, tmp_path: Path) -> None:
    with started("train.py", *training(shards, tmp_path, "--train.max_steps", 100_000)) as (process,):
        process.wait_for((tmp_path / "heartbeats").exists)  # the ranks have joined; the model is not built yet
        os.kill(process.pid, signal.SIGUSR1)
        done = process.end(time.monotonic() + 60)
    assert done.returncode == 85, done.stderr[-3000:]
    assert "asked to stop after step" in done.stderr
    for name in steps_of(tmp_path):  # a first step may have been made
        verify_checkpoint(tmp_path / "checkpoints" / name)


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1])
def test_a_signal_to_one_rank_during_a_save_saves_once_more_on_all(shards: Path, tmp_path: Path, delay: float) -> None:
    """A save is nearly always on its way; the signal goes to rank 1 alone."""
    arguments = training(shards, tmp_path, "--train.max_steps", 100_000, "--train.save_every_steps", 1)
    with started("train.py", *arguments, num_ranks=2) as ranks:
        ranks[0].wait_for(lambda: bool(list((tmp_path / "checkpoints").glob(".writing-*"))), seconds=60)
        time.sleep(delay)
        os.kill(ranks[1].pid, signal.SIGTERM)
        done = [rank.end(time.monotonic() + 60) for rank in ranks]
    assert [rank.returncode for rank in done] == [85, 85], done[0].stderr[-3000:]
    newest = steps_of(tmp_path)[-1]
    verify_checkpoint(tmp_path / "checkpoints" / newest)
    last = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"][-1]
    assert newest == f"step-{last:06d}"
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


def test_a_signal_in_the_last_evaluation_ends_at_once_and_the_next_start_evaluates(
    straight: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    arguments = training(
        shards, run, "--train.evaluate_at_end", "true", "--data.eval_shards", shards / "test",
        "--evaluation.batch_size", 1, "--train.max_steps", 7,
    )  # fmt: skip
    slow = ["--evaluation.max_new_tokens", 400]
    with started("train.py", *arguments, *slow) as (process,):
        process.wait_for(lambda: "evaluating" in (run / "log.txt").read_text())
        os.kill(process.pid, signal.SIGTERM)
        done = process.end(time.monotonic() + 30)
    assert done.returncode == 85, done.stderr[-3000:]
    assert steps_of(run)[-1] == "step-000007"
    assert not (run / "evaluation" / "results.json").exists()
    (again,) = forked("train.py", *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (run / "evaluation" / "results.json").exists()


def test_the_loss_on_other_shards_is_measured_and_the_best_step_kept(shards: Path, tmp_path: Path) -> None:
    """On two ranks and on one alike; and a run that measures trains as one that does not."""
    measured = ["--train.evaluate_every_steps", 2, "--data.eval_shards", shards / "test", "--evaluation.batch_size", 2]
    more = ["--train.save_every_steps", 2, "--train.keep_checkpoints", 1, "--train.keep_best", "eval_loss"]
    for number in (1, 2):
        for done in forked("train.py", *training(shards, tmp_path / str(number), *measured, *more), num_ranks=number):
            assert done.returncode == 0, done.stderr[-3000:]
    plain = forked("train.py", *training(shards, tmp_path / "plain"))
    assert plain[0].returncode == 0
    found = {n: [(e["step"], e["eval_loss"]) for e in events(tmp_path / n, "evaluation")] for n in ("1", "2")}
    assert [step for step, _ in found["1"]] == [2, 4, 6]
    assert [loss for _, loss in found["2"]] == pytest.approx([loss for _, loss in found["1"]], rel=1e-2)
    losses = {
        name: [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "step"]
        for name in ("1", "plain")
    }
    assert losses["1"] == losses["plain"]
    best = min(found["1"], key=lambda item: item[1])[0]
    assert steps_of(tmp_path / "1") == sorted({f"step-{best:06d}", "step-000006"})
    state = json.loads((tmp_path / "1" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["metrics"]["eval_loss"] == found["1"][-1][1]


def test_a_budget_of_time_saves_and_leaves_to_be_started_again(shards: Path, tmp_path: Path) -> None:
    arguments = training(shards, tmp_path, "--train.max_steps", 100_000, "--train.max_hours", 6 / 3600)
    began = time.monotonic()
    done = forked("train.py", *arguments, num_ranks=2)
    assert [rank.returncode for rank in done] == [85, 85], done[0].stderr[-3000:]
    assert time.monotonic() - began < 30
    newest = steps_of(tmp_path)[-1]
    verify_checkpoint(tmp_path / "checkpoints" / newest)
    last = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"][-1]
    assert newest == f"step-{last:06d}"


@pytest.fixture
def foreign(straight: Path, tmp_path: Path) -> Path:
    """A model folder with code in it that its configuration names, as if it were from a hub."""
    folder = tmp_path / "foreign"
    shutil.copytree(straight / "checkpoints" / "step-000006", folder)
    for name in ("files.json", "state.json"):  # what tells a step that a run saved
        (folder / name).unlink()
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return folder


@pytest.mark.parametrize("where", ["model", "text", "encoder", "processor", "tokenizer"])
def test_code_that_a_model_folder_names_is_not_run(foreign: Path, where: str) -> None:
    named = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")}
    named["auto_map"]["AutoProcessor"] = "evil.Evil"
    file = {"processor": "processor_config.json", "tokenizer": "tokenizer_config.json"}.get(where, "config.json")
    content = json.loads((foreign / file).read_text())
    place = {"text": "text_config", "encoder": "encoder_config"}.get(where)
    if place:
        content[place] |= {**named, "model_type": "evil"}
    else:
        content |= {**named, "trust_remote_code": True}
        if where == "tokenizer":
            content |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "EvilTokenizer"}
    (foreign / file).write_text(json.dumps(content))
    try:
        load_model_folder(foreign, "cpu")
    except CheckpointError as error:
        assert str(foreign) in str(error)  # noqa: PT017
    else:
        assert where != "text"  # a decoder of a kind that transformers does not know is refused
    assert not (foreign.parent / "marker").exists()


def test_a_pickle_in_place_of_the_weights_is_refused_by_the_command(
    straight: Path, shards: Path, tmp_path: Path
) -> None:
    import pickle

    from tests.checkpoint.test_checkpoint_load import Malicious

    folder = tmp_path / "foreign"
    shutil.copytree(straight / "checkpoints" / "step-000006", folder)
    for path in [*folder.glob("model*"), folder / "files.json", folder / "state.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    audio = next((shards / "corpus" / "audio" / "test").iterdir())
    for arguments in (
        ["train.py", *training(shards, tmp_path / "run", "--checkpoint_path", folder)],
        ["mellow-ds", "generate", "--checkpoint", folder, "--audio", audio, "--prompt", "what?"],
    ):
        (done,) = forked(*arguments)  # type: ignore[arg-type]
        assert done.returncode == 2, done.stderr[-3000:]
        assert "pytorch_model.bin is a pickle" in done.stderr
    assert not (tmp_path / "marker").exists()
