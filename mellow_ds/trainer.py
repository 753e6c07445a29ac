"""The training loop: fetch, step, record, save. Its parts are built elsewhere; nothing here knows a back end."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mellow_ds.checkpoint import CheckpointStore
from mellow_ds.config.schema import TrainConfig
from mellow_ds.data.kinds import Kinds
from mellow_ds.data.stream import StepBatches
from mellow_ds.engine.protocol import Engine, StepResult
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, FaultError
from mellow_ds.monitor.monitor import Monitor, StepRecord
from mellow_ds.stopping import StopRequest
from mellow_ds.world import World

_log = logging.getLogger("mellow_ds.trainer")


class Stream(Protocol):
    """What the trainer reads from: the micro-batches of one rank, an optimizer step at a time."""

    steps_per_epoch: int
    kinds: Kinds

    def __iter__(self) -> Iterator[StepBatches]: ...

    def state(self) -> dict[str, Any]:
        """Where the step after the last one taken out stands."""
        ...


@dataclass
class Progress:
    """Counters that a checkpoint keeps."""

    step: int = 0  # optimizer steps taken, skipped ones included
    num_updates: int = 0  # steps that changed the weights
    num_examples: int = 0
    num_answer_tokens: int = 0
    num_bad_samples: int = 0  # left out because they could not be read


class Trainer:
    """Runs optimizer steps `progress.step` .. `last_step`."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        engine: Engine,
        stream: Stream,
        schedule: Schedule,
        clip: ClipThreshold,
        checkpoints: CheckpointStore,
        monitor: Monitor,
        stop: StopRequest,
        last_step: int,
    ) -> None:
        self._config = config
        self._world = world
        self._engine = engine
        self._stream = stream
        self._schedule = schedule
        self._clip = clip
        self._checkpoints = checkpoints
        self._monitor = monitor
        self._stop = stop
        self._last_step = last_step
        self._saved_step = -1
        self.progress = Progress()

    def run(self) -> int:
        """Train to the last step or until asked to stop; returns the exit code."""
        if self.progress.step >= self._last_step:
            _log.info("step %d is the last: nothing to train", self.progress.step)
            return EXIT_DONE
        exit_code = EXIT_DONE
        fetch = _timed(iter(self._stream))
        while self.progress.step < self._last_step and not exit_code:
            step, wait_seconds = next(fetch)
            started = time.perf_counter()
            learning_rate = self._schedule.learning_rate(self.progress.step)
            result = self._engine.train_step(
                step.micro_batches, learning_rate, self._clip.threshold(), self._stream.kinds.num_kinds
            )
            self._advance(result)
            exit_code = self._agree(len(step.stats.bad_samples))
            self._record(result, learning_rate, wait_seconds, time.perf_counter() - started)
            self._save_if_due(exit_code)
        if exit_code:
            _log.warning("asked to stop: step %d is saved; start again to go on", self.progress.step)
        return exit_code

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `_state` put into a checkpoint."""
        self.progress = Progress(**{key: int(value) for key, value in state["progress"].items()})
        self._schedule.load_state(state["schedule"])
        self._clip.load_state(state["clip"])
        self._saved_step = self.progress.step

    def _advance(self, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        progress.num_updates += not result.skipped
        progress.num_examples += result.num_examples
        progress.num_answer_tokens += result.num_answer_tokens
        self._schedule.observe(result.loss)
        self._clip.observe(result.grad_norm)
        if not math.isfinite(result.loss):
            raise FaultError(
                f"the loss of step {progress.step} is {result.loss}: lower train.learning_rate, or use bfloat16 "
                "instead of float16; the newest checkpoint is from before"
            )

    def _agree(self, num_bad_samples: int) -> int:
        """The exit code that any rank was asked for: all ranks stop after the same step. Bad samples are added up."""
        asked = self._stop.exit_code
        numbers = [asked == EXIT_STOPPED, asked == EXIT_INTERRUPTED, num_bad_samples]
        totals = torch.tensor(numbers, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(totals)
        num_stopped, num_interrupted, num_bad = totals.tolist()
        self.progress.num_bad_samples += num_bad
        return EXIT_INTERRUPTED if num_interrupted else EXIT_STOPPED if num_stopped else EXIT_DONE

    def _record(self, result: StepResult, learning_rate: float, wait_seconds: float, step_seconds: float) -> None:
        seconds = wait_seconds + step_seconds
        self._monitor.step(
            StepRecord(
                step=self.progress.step,
                epoch=self.progress.step / self._stream.steps_per_epoch,
                loss=result.loss,
                learning_rate=learning_rate,
                grad_norm=result.grad_norm,
                num_examples=result.num_examples,
                examples_per_second=result.num_examples / seconds,
                answer_tokens_per_second=result.num_answer_tokens / seconds,
                data_wait_fraction=wait_seconds / seconds,
                seconds=seconds,
                num_bad_samples=self.progress.num_bad_samples,
                kind_losses=self._stream.kinds.sums(result.kind_losses),
            )
        )

    def _save_if_due(self, exit_code: int) -> None:
        every, step = self._config.save_every_steps, self.progress.step
        if exit_code or step == self._last_step or (every and step % every == 0):
            self.save()

    def save(self) -> None:
        """Publish a checkpoint of this step, once."""
        if self._saved_step == self.progress.step:
            return
        started = time.perf_counter()
        folder = self._checkpoints.save(self.progress.step, self._engine, self._state())
        self._saved_step = self.progress.step
        seconds = time.perf_counter() - started
        _log.info("saved %s in %.1f s", folder.name, seconds)
        self._monitor.event("save", self.progress.step, {"seconds": seconds})

    def _state(self) -> dict[str, Any]:
        return {
            "num_updates": self.progress.num_updates,
            "progress": vars(self.progress).copy(),
            "schedule": self._schedule.state(),
            "clip": self._clip.state(),
            "scaler": self._engine.scaler_state(),
            "stream": self._stream.state(),
        }


def _timed(steps: Iterator[StepBatches]) -> Iterator[tuple[StepBatches, float]]:
    """Each item with the seconds that were spent waiting for it."""
    while True:
        started = time.perf_counter()
        step = next(steps, None)
        if step is None:
            raise FaultError("the data stream ended before the last step: this should not happen; please report it")
        yield step, time.perf_counter() - started


def agreement(device: torch.device) -> Callable[[bool], bool]:
    """A function that tells all ranks whether all of them are well (see `CheckpointStore`)."""

    def agree(ok: bool) -> bool:
        flag = torch.tensor(int(ok), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    return agree
