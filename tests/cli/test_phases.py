"""train.phases by the real command: parts are freed at their step, on both back ends, stopped or not."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.cli import training
from mellow_ds.config.load import load_run_config
from mellow_ds.errors import EXIT_DONE, EXIT_STOPPED
from mellow_ds.monitor.metrics import read_metrics
from mellow_ds.stopping import StopRequest
from mellow_ds.world import World
from tests.cli.runs import TINY, forked

pytestmark = pytest.mark.slow
PHASES = "[{from_step: 0, train: [projector]}, {from_step: 3, train: [projector, decoder, encoder]}]"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


def train(shards: Path, run: Path, *more: object) -> str:
    arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", run, *TINY]
    ranks = forked("train.py", *arguments, "--train.phases", PHASES, *more, num_ranks=2)
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr[-3000:]
    return ranks[0].stderr


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    with TensorFiles(run / "checkpoints" / f"step-{step:06d}", "model") as files:
        return {name: files.read(name).clone() for name in files.names()}


def test_phases_go_on_from_each_other_though_a_run_is_never_resumed(shards: Path, tmp_path: Path) -> None:
    """resume never: nothing of an earlier start."""
    train(shards, tmp_path / "run", "--train.resume", "never", "--engine", "fsdp")
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([(0, 3), (0, 6)], EXIT_DONE),
        ([(EXIT_STOPPED, 3)], EXIT_STOPPED),  # asked in the last step of a phase: the next is not built
        ([(0, 3), (EXIT_STOPPED, 4)], EXIT_STOPPED),
        ([(0, 3), (EXIT_STOPPED, 6)], EXIT_DONE),  # in the last step of all
    ],
)
def test_a_phase_leaves_nothing_behind_and_a_stop_is_heard_before_the_next(
    shards: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[int, int]], code: int
) -> None:
    left: list[weakref.ref[object]] = []

    class Model:
        """One that holds itself, as engines do."""

        def __init__(self) -> None:
            self.itself = self
            left.append(weakref.ref(self))

    def phase(_: training._Run, is_begun: bool) -> tuple[int, int]:
        assert is_begun == bool(left)
        assert all(model() is None for model in left)
        Model()
        return outcomes[len(left) - 1]

    keys = {"data.shards": str(shards / "train"), "train.max_steps": "6", "train.warmup_steps": "0"}
    config = load_run_config("quickstart", keys)
    monkeypatch.setattr(training, "_train_phase", phase)
    gc.disable()  # not by chance
    try:
        assert training.train(config, World(), torch.device("cpu"), StopRequest()) == code
    finally:
        gc.enable()
    assert len(left) == len(outcomes)


def test_phases_train_what_they_name_and_a_stop_changes_nothing(shards: Path, tmp_path: Path) -> None:
    said = train(shards, tmp_path / "ds", "--train.save_every_steps", 1, "--train.keep_checkpoints", 9)
    assert "(projector);" in said
    assert "(encoder, projector, decoder);" in said
    by_step = {step: weights(tmp_path / "ds", step) for step in (1, 3, 6)}
    moved = {
        span: {name.split(".")[0] for name, weight in by_step[a].items() if not torch.equal(weight, by_step[b][name])}
        for span, (a, b) in {"first": (1, 3), "second": (3, 6)}.items()
    }
    assert moved == {"first": {"projector"}, "second": {"projector", "decoder", "encoder"}}
    for stop in (2, 4):
        train(shards, tmp_path / "stopped", "--train.stop_at_step", stop)
    train(shards, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "ds")
    train(shards, tmp_path / "fsdp", "--engine", "fsdp", "--deepspeed_config", "ds_configs/zero3.json")
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ds"), rel=1e-5)
    # from one back end to the other in the middle of each phase, and at the end of the first
    train(shards, tmp_path / "both", "--engine", "fsdp", "--train.stop_at_step", 2)
    train(shards, tmp_path / "both", "--engine", "deepspeed", "--train.stop_at_step", 3)
    train(shards, tmp_path / "both", "--engine", "fsdp", "--train.stop_at_step", 5)
    train(shards, tmp_path / "both", "--engine", "deepspeed", "--deepspeed_config", "ds_configs/zero3.json")
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "ds"), rel=1e-5)
