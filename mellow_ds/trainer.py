"""The training loop: fetch, step, record, measure, save. Its parts are built elsewhere; it knows no back end."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mellow_ds.checkpoint.store import CheckpointStore, SaveOutcome
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.kinds import Kinds
from mellow_ds.data.stream import StepBatches
from mellow_ds.engine.protocol import Engine, StepResult
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, FaultError, SaveError
from mellow_ds.evaluation.eval_loss import EvalLoss
from mellow_ds.monitor.heartbeat import Heartbeat
from mellow_ds.monitor.monitor import Monitor, StepRecord
from mellow_ds.stopping import StopRequest, TimeBudget
from mellow_ds.world import World

_COMPILE_SECONDS = 1800.0  # that the first step may take where the model is compiled
_SAVE_SECONDS = 3600.0  # that a slow disk may take for a checkpoint
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
    num_skipped: int = 0  # steps that left the weights as they were
    num_skipped_in_row: int = 0  # the newest of them, without one that changed the weights in between


@dataclass
class _Metrics:
    """What `train.keep_best` compares checkpoints by."""

    loss_sum: float = 0.0  # over the answer tokens of the steps since the checkpoint before
    num_answer_tokens: int = 0
    eval_loss: float | None = None  # of this very step, where it was measured

    def add(self, result: StepResult) -> None:
        """Count a step that changed the weights."""
        if not result.skipped:
            self.loss_sum += result.loss * result.num_answer_tokens
            self.num_answer_tokens += result.num_answer_tokens

    def take_back(self, unsaved: "_Metrics") -> None:
        """Count again the steps of a checkpoint that could not be saved: they belong to the next one."""
        self.loss_sum += unsaved.loss_sum
        self.num_answer_tokens += unsaved.num_answer_tokens

    def values(self) -> dict[str, float | None]:
        """By the names of `train.keep_best`."""
        loss = self.loss_sum / self.num_answer_tokens if self.num_answer_tokens else None
        return {"loss": loss, "eval_loss": self.eval_loss}


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
        heartbeat: Heartbeat | None = None,
        measure: Callable[[], EvalLoss] | None = None,
        budget: TimeBudget | None = None,
    ) -> None:
        """`measure`: the loss on the evaluation set, a collective call; None where `evaluate_every_steps` is 0.

        `budget`: of the phases before in this process; None: this is all there is.
        """
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
        self._heartbeat = heartbeat or Heartbeat()
        self._measure = measure
        self._budget = budget or TimeBudget(config.max_hours, stop.started)
        self._metrics = _Metrics()
        self._metrics_in_save = _Metrics()  # of the checkpoint on its way
        self.progress = Progress()

    def run(self) -> int:
        """Train to the last step or until asked to stop; returns the exit code, that of a stop in the last step too."""
        if self.progress.step >= self._last_step:
            _log.info("step %d is the last: nothing to train", self.progress.step)
            return EXIT_DONE
        self._budget.begin_steps()
        exit_code = self._agree(0)  # a signal may have come while the run was starting
        try:
            exit_code = exit_code or self._run_steps()
        except BaseException:
            self._checkpoints.leave()
            raise
        return exit_code

    def _run_steps(self) -> int:
        exit_code = EXIT_DONE
        compiled = not self._config.compile
        fetch = _timed(iter(self._stream))
        while self.progress.step < self._last_step and not exit_code:
            self._heartbeat.at("fetch", self.progress.step + 1)
            step, wait_seconds = next(fetch)
            self._heartbeat.at(
                "forward-backward",
                batches=[batch.example_ids for batch in step.micro_batches],
                grace_seconds=0.0 if compiled else _COMPILE_SECONDS,
            )
            started = time.perf_counter()
            learning_rate = self._schedule.learning_rate(self.progress.step)
            result = self._engine.train_step(
                step.micro_batches, learning_rate, self._clip.threshold(), self._stream.kinds.num_kinds
            )
            compiled = True
            self._advance(result)
            self._heartbeat.at("agree")
            exit_code = self._agree(len(step.stats.bad_samples))
            self._record(result, learning_rate, wait_seconds, time.perf_counter() - started)
            self._stop_at_skips(result)
            if not exit_code:
                self._measure_if_due()
            self._save_if_due(exit_code)
        return exit_code

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `_state` put into a checkpoint."""
        self.progress = Progress(**{key: int(value) for key, value in state["progress"].items()})
        self._schedule.load_state(state["schedule"])
        self._clip.load_state(state["clip"])

    def _advance(self, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        progress.num_updates += not result.skipped
        progress.num_skipped += result.skipped
        progress.num_skipped_in_row = progress.num_skipped_in_row + 1 if result.skipped else 0
        progress.num_examples += result.num_examples
        progress.num_answer_tokens += result.num_answer_tokens
        self._schedule.observe(result.loss)
        self._clip.observe(result.grad_norm)
        self._metrics.add(result)

    def _stop_at_skips(self, result: StepResult) -> None:
        """Warn of a skipped step; raise `FaultError` past train.max_skipped_steps in a row, on all ranks alike."""
        if not result.skipped:
            return
        progress, most = self.progress, self._config.max_skipped_steps
        fault = result.fault or "gradients overflowed float16 at the loss scale of that step"
        if self._world.is_main:
            _log.warning("step %d is skipped, %d in a row: %s", progress.step, progress.num_skipped_in_row, fault)
        if progress.num_skipped_in_row > most:
            self._finish_save()
            raise FaultError(
                f"{progress.num_skipped_in_row} steps in a row up to step {progress.step} were skipped, more than "
                f"train.max_skipped_steps ({most}); the last: {fault}; lower train.learning_rate, look at those "
                "examples, or use bfloat16 instead of float16"
            )

    def _agree(self, num_bad_samples: int) -> int:
        """The exit code that any rank was asked for: all ranks stop after the same step. Bad samples are added up, and
        the ranks learn how far each other's part of a save is."""
        self._budget.note_step()
        self._stop.is_out_of_time |= self._budget.is_spent
        stopped = self._stop.exit_code == EXIT_STOPPED or self._stop.is_out_of_time
        over, failed = self._checkpoints.vote()
        numbers = [stopped, self._stop.exit_code == EXIT_INTERRUPTED, num_bad_samples, over, failed]
        num_stopped, num_interrupted, num_bad, num_over, num_failed = self._add_up(numbers)
        self.progress.num_bad_samples += num_bad
        self._note_save(self._checkpoints.settle(num_over, num_failed))
        return EXIT_INTERRUPTED if num_interrupted else EXIT_STOPPED if num_stopped else EXIT_DONE

    def _add_up(self, numbers: list[int]) -> list[int]:
        totals = torch.tensor(numbers, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(totals)
        return [int(total) for total in totals.tolist()]

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

    def _measure_if_due(self) -> None:
        """Record the loss on the evaluation set, where it is this step's turn."""
        every, step = self._config.evaluate_every_steps, self.progress.step
        if self._measure is None or not every or step % every:
            return
        self._finish_save()
        self._heartbeat.at("evaluate")
        started = time.perf_counter()
        measured = self._measure()
        self._metrics.eval_loss = measured.loss
        _log.info("step %d: eval_loss %.4f over %d examples", step, measured.loss, measured.num_examples)
        values = {"eval_loss": measured.loss, "num_examples": measured.num_examples}
        self._monitor.event("evaluation", step, {**values, "seconds": time.perf_counter() - started})

    def _save_if_due(self, exit_code: int) -> None:
        every, step = self._config.save_every_steps, self.progress.step
        is_last = bool(exit_code) or step == self._last_step
        if is_last or (every and step % every == 0):
            self._save(is_last)
        self._metrics.eval_loss = None  # it was that of this step

    def _save(self, is_last: bool) -> None:
        """Begin a checkpoint of this step; wait for it where it is the last one, and raise `SaveError` if it fails."""
        self._finish_save()
        self._heartbeat.at("save", grace_seconds=_SAVE_SECONDS)
        outcome = self._checkpoints.begin(self.progress.step, self._engine, self._state())
        self._metrics, self._metrics_in_save = _Metrics(), self._metrics
        if outcome is None and (is_last or not self._config.async_save):
            outcome = self._checkpoints.wait()
        if is_last and outcome is not None and outcome.error:
            self._monitor.event("save_failed", outcome.step, {"reason": outcome.error})
            raise SaveError(outcome.error)
        self._note_save(outcome)

    def _finish_save(self) -> None:
        """Wait for the save that is on its way, if there is one."""
        self._heartbeat.at("save", grace_seconds=_SAVE_SECONDS)
        self._note_save(self._checkpoints.wait())

    def _note_save(self, outcome: SaveOutcome | None) -> None:
        """Record how a save ended. A failed one costs nothing but itself: the next is tried when it is due."""
        if outcome is None:
            return
        if outcome.error:
            self._monitor.event("save_failed", outcome.step, {"reason": outcome.error})
            if self._world.is_main:
                _log.error("%s; the run goes on", outcome.error)
            self._metrics.take_back(self._metrics_in_save)
            return
        self._budget.note_save(outcome.seconds)
        _log.info(
            "saved %s in %.1f s; training waited %.1f s", outcome.folder.name, outcome.seconds, outcome.seconds_blocked
        )
        values = {"seconds": outcome.seconds, "seconds_blocked": outcome.seconds_blocked, "bytes": outcome.num_bytes}
        self._monitor.event("save", outcome.step, values)

    def _state(self) -> dict[str, Any]:
        return {
            "num_updates": self.progress.num_updates,
            "progress": vars(self.progress).copy(),
            "schedule": self._schedule.state(),
            "clip": self._clip.state(),
            "scaler": self._engine.scaler_state(),
            "metrics": self._metrics.values(),
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
