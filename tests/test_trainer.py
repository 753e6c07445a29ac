"""The loop with an engine that only counts: what is fed, recorded, saved, and when it stops."""

import signal
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mellow_ds.config.schema import TrainConfig
from mellow_ds.data.examples import LoadStats
from mellow_ds.data.kinds import Kinds
from mellow_ds.data.reader import BadSampleError, Place
from mellow_ds.data.stream import StepBatches
from mellow_ds.engine.protocol import StepResult
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, FaultError
from mellow_ds.monitor.monitor import Monitor
from mellow_ds.monitor.record import StepRecord
from mellow_ds.stopping import StopRequest
from mellow_ds.trainer import Trainer
from mellow_ds.world import World
from tests.ranks import run_ranks

BAD = BadSampleError(Place("shard-000003.tar", "k", 7), "audio", "it is broken")


@dataclass
class Stream:
    """Steps without examples; on rank 1 each second one left a sample out."""

    rank: int = 0
    steps_per_epoch: int = 4
    step: int = 0
    kinds = Kinds(("",), (0,), ("x", "y"))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StepBatches:
        bad = (BAD,) if self.rank == 1 and self.step % 2 else ()
        self.step += 1
        return StepBatches(self.step - 1, 0, self.step - 1, (), LoadStats(bad_samples=bad), self.state())

    def state(self) -> dict[str, Any]:
        return {"step": self.step}


class Engine:
    """Gives a loss and asks for a stop where it is told to."""

    name, device = "counting", torch.device("cpu")

    def __init__(self, stop: StopRequest | None = None, stop_at: int = 0, losses: tuple[float, ...] = ()) -> None:
        self.stop, self.stop_at, self.losses, self.steps = stop, stop_at, losses, 0

    def train_step(self, _batches: Any, _learning_rate: float, _max_grad_norm: float, num_kinds: int) -> StepResult:
        assert num_kinds == 2
        self.steps += 1
        if self.stop is not None and self.steps == self.stop_at:
            self.stop.exit_code = EXIT_STOPPED
        loss = self.losses[self.steps - 1] if self.losses else 1.0
        return StepResult(loss, 0.5, 10, 4, False, ((3.0, 6.0), (0.0, 0.0)))

    def scaler_state(self) -> dict[str, float]:
        return {}


class Checkpoints:
    """Remembers what was saved."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []

    def save(self, step: int, _engine: Any, state: dict[str, Any]) -> Any:
        self.saved.append((step, state))
        return type("Folder", (), {"name": f"step-{step}"})


class Records(Monitor):
    """Keeps the records."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)


def make(world: World, engine: Engine, stop: StopRequest, last_step: int = 6, **train: Any) -> tuple[Trainer, Any, Any]:
    config = TrainConfig(**{"save_every_steps": 4, "max_steps": last_step, **train})
    checkpoints, records = Checkpoints(), Records()
    schedule, clip = Schedule(config, last_step), ClipThreshold(config)
    stream = Stream(world.rank)
    trainer = Trainer(config, world, engine, stream, schedule, clip, checkpoints, records, stop, last_step)  # type: ignore[arg-type]
    return trainer, checkpoints, records


def one_rank(world: World) -> None:
    trainer, checkpoints, records = make(world, Engine(), StopRequest())
    assert trainer.run() == 0
    assert [step for step, _ in checkpoints.saved] == [4, 6]
    assert checkpoints.saved[1][1]["stream"] == {"step": 6}
    assert checkpoints.saved[1][1]["progress"]["num_examples"] == 24
    assert [r.step for r in records.steps] == [1, 2, 3, 4, 5, 6]
    assert records.steps[3].epoch == 1.0
    assert records.steps[0].kind_losses == {"subtype/x": (3.0, 6.0), "subtype/y": (0.0, 0.0)}

    again, checkpoints, _ = make(world, Engine(), StopRequest(), last_step=8)
    again.restore(checkpoints_of_step_6 := {**trainer._state(), "schedule": trainer._schedule.state()})
    assert checkpoints_of_step_6["progress"]["step"] == 6
    assert again.run() == 0
    assert [step for step, _ in checkpoints.saved] == [8]

    failing, checkpoints, _ = make(world, Engine(losses=(1.0, float("nan"))), StopRequest())
    with pytest.raises(FaultError, match="the loss of step 2 is nan"):
        failing.run()
    assert not checkpoints.saved


def two_ranks(world: World) -> None:
    """Only rank 1 is asked to stop, in step 3: both save step 3 and stop. Only rank 1 has bad samples: both count."""
    stop = StopRequest()
    trainer, checkpoints, records = make(world, Engine(stop if world.rank == 1 else None, 3), stop)
    assert trainer.run() == EXIT_STOPPED
    assert [step for step, _ in checkpoints.saved] == [3]
    assert [r.num_bad_samples for r in records.steps] == [0, 1, 1]
    assert checkpoints.saved[0][1]["progress"]["num_bad_samples"] == 1
    stop = StopRequest()
    stop.exit_code = EXIT_INTERRUPTED if world.rank == 0 else EXIT_STOPPED
    trainer, _, _ = make(world, Engine(), stop)
    assert trainer.run() == EXIT_INTERRUPTED


def test_steps_saves_records_and_resume() -> None:
    run_ranks(1, one_rank)


def test_ranks_stop_together_and_add_up_bad_samples() -> None:
    run_ranks(2, two_ranks)


def test_signals_become_exit_codes() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    stop = StopRequest()
    stop.listen()
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.exit_code == EXIT_STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
