"""The loop with an engine that only counts: what is fed, recorded, measured, saved, and when it stops."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mellow_ds.checkpoint.store import SaveOutcome
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.examples import LoadStats
from mellow_ds.data.kinds import Kinds
from mellow_ds.data.reader import BadSampleError, Place
from mellow_ds.data.stream import StepBatches
from mellow_ds.engine.protocol import StepResult
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, FaultError, SaveError
from mellow_ds.evaluation.eval_loss import EvalLoss
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

    def __init__(
        self,
        stop: StopRequest | None = None,
        stop_at: int = 0,
        losses: tuple[float, ...] = (),
        skipped: tuple[int, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        self.stop, self.stop_at, self.losses, self.steps = stop, stop_at, losses, 0
        self.skipped, self.seconds = skipped, seconds

    def train_step(self, _batches: Any, _learning_rate: float, _max_grad_norm: float, num_kinds: int) -> StepResult:
        assert num_kinds == 2
        self.steps += 1
        if self.stop is not None and self.steps == self.stop_at:
            self.stop.exit_code = EXIT_STOPPED
        time.sleep(self.seconds)
        loss = self.losses[self.steps - 1] if self.losses else 1.0
        fault = f"fault {self.steps}" if self.steps in self.skipped else ""
        return StepResult(loss, 0.5, 10, 4, bool(fault), ((3.0, 6.0), (0.0, 0.0)), fault)

    def scaler_state(self) -> dict[str, float]:
        return {}


@dataclass
class Checkpoints:
    """Remembers what was saved; a save is under way for `steps_needed` agreements, and fails at the steps `failing`."""

    failing: tuple[int, ...] = ()
    steps_needed: int = 0
    saved: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)  # steps whose save was waited for
    left: bool = False
    _pending: tuple[int, int] | None = None  # step, agreements that it still takes

    def begin(self, step: int, _engine: Any, state: dict[str, Any]) -> SaveOutcome | None:
        assert self._pending is None, "two saves at a time"
        self._pending = (step, self.steps_needed)
        self.saved.append((step, state))
        return None

    def vote(self) -> tuple[int, int]:
        return (0, 0) if self._pending is None or self._pending[1] else (1, 0)

    def settle(self, num_over: int, _num_failed: int) -> SaveOutcome | None:
        if self._pending is None:
            return None
        if num_over:
            return self._end()
        self._pending = (self._pending[0], self._pending[1] - 1)
        return None

    def wait(self) -> SaveOutcome | None:
        if self._pending is not None:
            self.waits.append(self._pending[0])
        return self._end() if self._pending is not None else None

    def leave(self) -> None:
        self.left = True

    def _end(self) -> SaveOutcome:
        assert self._pending is not None
        step, self._pending = self._pending[0], None
        error = f"step {step} was not saved: the disk is full" if step in self.failing else ""
        return SaveOutcome(step, Path(f"step-{step}"), 8, 0.1, 0.2, error)


class Records(Monitor):
    """Keeps the records and events."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.events: list[tuple[str, int]] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def event(self, name: str, step: int, _values: Any = None) -> None:
        self.events.append((name, step))


def make(
    world: World,
    engine: Engine,
    stop: StopRequest,
    last_step: int = 6,
    checkpoints: Checkpoints | None = None,
    measure: Any = None,
    **train: Any,
) -> tuple[Trainer, Any, Any]:
    config = TrainConfig(**{"save_every_steps": 4, "max_steps": last_step, **train})
    checkpoints, records = checkpoints or Checkpoints(), Records()
    schedule, clip = Schedule(config, last_step), ClipThreshold(config)
    stream = Stream(world.rank)
    trainer = Trainer(
        config,
        world,
        engine,
        stream,
        schedule,
        clip,
        checkpoints,
        records,
        stop,
        last_step,
        measure=measure,  # type: ignore[arg-type]
    )
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

    saves_in_the_background(world)
    failing_saves(world)
    skipped_steps(world)
    measuring(world)
    time_budget(world)
    signals(world)


def saves_in_the_background(world: World) -> None:
    """A save is noted some steps later; the next one waits for it, and so does the end."""
    trainer, checkpoints, records = make(
        world, Engine(), StopRequest(), 7, Checkpoints(steps_needed=2), save_every_steps=2
    )
    assert trainer.run() == 0
    assert [step for step, _ in checkpoints.saved] == [2, 4, 6, 7]
    assert checkpoints.waits == [2, 4, 6, 7]
    assert records.events == [("save", step) for step in (2, 4, 6, 7)]
    trainer, checkpoints, records = make(world, Engine(), StopRequest(), 6, Checkpoints(), save_every_steps=3)
    assert trainer.run() == 0
    assert checkpoints.waits == [6]  # that of step 3 had ended by itself
    trainer, checkpoints, _ = make(world, Engine(), StopRequest(), 6, save_every_steps=3, async_save=False)
    assert trainer.run() == 0
    assert checkpoints.waits == [3, 6]


def failing_saves(world: World) -> None:
    """A failed one in between is noted and the next one tried; a failed last one ends the run with code 1."""
    losses = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    trainer, checkpoints, records = make(
        world, Engine(losses=losses), StopRequest(), 6, Checkpoints(failing=(2, 4)), save_every_steps=2
    )
    assert trainer.run() == 0
    # what could not be saved counts in the next
    saved = [(step, state["metrics"]["loss"]) for step, state in checkpoints.saved]
    assert saved == [(2, 1.5), (4, 2.5), (6, 3.5)]
    assert records.events == [("save_failed", 2), ("save_failed", 4), ("save", 6)]
    trainer, checkpoints, records = make(world, Engine(), StopRequest(), 6, Checkpoints(failing=(6,)))
    with pytest.raises(SaveError, match="step 6 was not saved: the disk is full") as caught:
        trainer.run()
    assert caught.value.exit_code == 1
    assert checkpoints.left
    assert records.events == [("save", 4), ("save_failed", 6)]


def skipped_steps(world: World) -> None:
    """Counted in a row, kept in the checkpoint, fatal past the limit; they change neither loss nor updates."""
    nan = float("nan")
    losses = (1.0, nan, nan, 4.0, nan, 3.0)
    trainer, checkpoints, _ = make(
        world, Engine(losses=losses, skipped=(2, 3, 5)), StopRequest(), max_skipped_steps=2, save_every_steps=3
    )
    assert trainer.run() == 0
    progress = [state["progress"] for _, state in checkpoints.saved]
    assert [(p["num_skipped"], p["num_skipped_in_row"], p["num_updates"]) for p in progress] == [(2, 2, 1), (3, 0, 3)]
    assert [state["metrics"]["loss"] for _, state in checkpoints.saved] == [1.0, 3.5]  # since the save before
    again, checkpoints, _ = make(
        world, Engine(losses=(nan,), skipped=(1,)), StopRequest(), max_skipped_steps=2, save_every_steps=3
    )
    again.restore({"progress": progress[0], "schedule": trainer._schedule.state(), "clip": trainer._clip.state()})
    with pytest.raises(FaultError, match=r"3 steps in a row up to step 4 were skipped.*\(2\); the last: fault 1"):
        again.run()
    assert checkpoints.left


def measuring(world: World) -> None:
    """At its steps; a save on its way is waited for; the checkpoint of that very step has the value."""
    values = iter((3.0, 2.0))
    trainer, checkpoints, records = make(
        world, Engine(), StopRequest(), 6, Checkpoints(steps_needed=9), lambda: EvalLoss(next(values), 5, 2),
        evaluate_every_steps=3, save_every_steps=2,
    )  # fmt: skip
    assert trainer.run() == 0
    assert [(step, state["metrics"]["eval_loss"]) for step, state in checkpoints.saved] == [
        (2, None),
        (4, None),
        (6, 2),
    ]
    assert records.events == [
        ("save", 2), ("evaluation", 3), ("save", 4), ("evaluation", 6), ("save", 6),
    ]  # fmt: skip


def time_budget(world: World) -> None:
    """0.6 s with steps of 0.05 s: it stops by itself, well before all steps, with a checkpoint of the last one made."""
    trainer, checkpoints, _ = make(
        world, Engine(seconds=0.05), StopRequest(), 1000, max_hours=0.6 / 3600, save_every_steps=0
    )
    assert trainer.run() == EXIT_STOPPED
    assert [step for step, _ in checkpoints.saved] == [trainer.progress.step]
    assert 1 <= trainer.progress.step < 12


def signals(world: World) -> None:
    """Before the first step there is nothing to save; in the last step of a phase the next need not be built."""
    stop = StopRequest()
    stop.exit_code = EXIT_STOPPED
    trainer, checkpoints, _ = make(world, Engine(), stop)
    assert trainer.run() == EXIT_STOPPED
    assert not checkpoints.saved
    stop = StopRequest()
    trainer, checkpoints, _ = make(world, Engine(stop, 6), stop)
    assert trainer.run() == EXIT_STOPPED
    assert [step for step, _ in checkpoints.saved] == [4, 6]


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
