"""What the trainer tells of a run, each step and event: to metrics.jsonl, TensorBoard and the terminal, on rank 0."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mellow_ds.monitor.gpu import GpuMeter, open_gpu_meter
from mellow_ds.monitor.metrics import METRICS_NAME, MetricsFile
from mellow_ds.monitor.progress import Progress
from mellow_ds.monitor.record import GpuReading, StepRecord, as_metrics
from mellow_ds.monitor.tensorboard import TENSORBOARD_NAME, TensorBoard
from mellow_ds.world import World


class Monitor:
    """A monitor that writes nothing: that of a rank above 0. A context manager that closes itself."""

    def step(self, record: StepRecord) -> None:
        """Take note of an optimizer step; call it after each."""

    def event(self, name: str, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Take note of what happened after `step` (a save, a resume, an evaluation), with numbers or texts."""

    def close(self) -> None:
        """Write what is left and close all files. May be called twice."""

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RunMonitor(Monitor):
    """The monitor of rank 0: every step moves the bar; each `log_every_steps`-th one and the ends are recorded."""

    def __init__(
        self,
        metrics: MetricsFile,
        tensorboard: TensorBoard,
        progress: Progress,
        gpu: GpuMeter | None,
        total_steps: int,
        log_every_steps: int,
    ) -> None:
        self._metrics = metrics
        self._tensorboard = tensorboard
        self._progress = progress
        self._gpu = gpu
        self._total_steps = total_steps
        self._log_every_steps = log_every_steps
        self._window: list[StepRecord] = []  # steps since the last record
        self._any_recorded = False
        self._last_reading: GpuReading | None = None
        self._closed = False

    def step(self, record: StepRecord) -> None:
        """Show a step and record it where it is its turn."""
        self._window.append(record)
        if not self._any_recorded or record.step % self._log_every_steps == 0 or record.step == self._total_steps:
            self._record()
        self._progress.step(dataclasses.replace(record, gpu=self._last_reading))

    def _record(self) -> None:
        record = mean_rates(self._window)
        self._window.clear()
        self._any_recorded = True
        if self._gpu is not None:
            self._last_reading = self._gpu.read()
            record = dataclasses.replace(record, gpu=self._last_reading)
        values = as_metrics(record)
        step = int(values.pop("step"))
        self._metrics.write("step", step, values)
        self._tensorboard.scalars("train", step, values)
        self._progress.line(record)

    def event(self, name: str, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Record an event: its numbers also as TensorBoard scalars `name/key`."""
        content = dict(values or {})
        self._metrics.write("event", step, {"name": name, **content})
        self._tensorboard.scalars(name, step, content)

    def close(self) -> None:
        """Record the last step if it was not, and close all files."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._window:
                self._record()
        finally:
            self._progress.close()
            self._tensorboard.close()
            self._metrics.close()


def mean_rates(window: list[StepRecord]) -> StepRecord:
    """The last of these steps, with rates, data wait and losses by kind over all of them.

    Rates and wait are means weighted by the steps' seconds, losses by kind are summed.
    """
    last = dataclasses.replace(window[-1], kind_losses=_summed([record.kind_losses for record in window]))
    seconds = sum(record.seconds for record in window)
    if seconds <= 0:
        return last
    return dataclasses.replace(
        last,
        examples_per_second=sum(r.examples_per_second * r.seconds for r in window) / seconds,
        answer_tokens_per_second=sum(r.answer_tokens_per_second * r.seconds for r in window) / seconds,
        data_wait_fraction=sum(r.data_wait_fraction * r.seconds for r in window) / seconds,
    )


def _summed(losses: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for step in losses:
        for name, (total, count) in step.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + total, before[1] + count)
    return found


def open_monitor(
    world: World,
    run_folder: str | Path,
    *,
    total_steps: int,
    log_every_steps: int,
    resumed_step: int = 0,
    cuda_index: int | None = None,
) -> Monitor:
    """The monitor of this rank, writing `metrics.jsonl` and `tensorboard/` into `run_folder` on rank 0.

    `resumed_step`: the step that the run goes on from (0: from the start); what the folder says of later steps is
    dropped.
    `cuda_index`: rank 0's device as CUDA numbers it, None without GPUs.
    """
    if not world.is_main:
        return Monitor()
    folder = Path(run_folder)
    metrics = MetricsFile(folder / METRICS_NAME, resumed_step)
    tensorboard = TensorBoard(folder / TENSORBOARD_NAME, resumed_step)
    progress = Progress(total_steps, resumed_step)
    return RunMonitor(metrics, tensorboard, progress, open_gpu_meter(cuda_index), total_steps, log_every_steps)
