"""The monitor as the trainer uses it: what is recorded when, on which rank, with what scope, and across a resume."""

import dataclasses
from pathlib import Path

import pytest

from mellow_ds.monitor.metrics import read_metrics
from mellow_ds.monitor.monitor import RunMonitor, mean_rates, open_monitor
from mellow_ds.monitor.record import GpuReading, StepRecord, as_metrics
from mellow_ds.world import World


def _record(step: int, **changes: object) -> StepRecord:
    record = StepRecord(
        step=step,
        epoch=step / 10,
        loss=1 / step,
        learning_rate=1e-3,
        grad_norm=0.5,
        examples_per_second=8.0,
        answer_tokens_per_second=80.0,
        data_wait_fraction=0.1,
        num_examples=4,
        seconds=0.5,
    )
    return dataclasses.replace(record, **changes)


def _steps(folder: Path, kind: str = "step") -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == kind]


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars(tag)]


def test_first_every_nth_and_last_step_are_recorded(tmp_path: Path) -> None:
    with open_monitor(World(), tmp_path, total_steps=12, log_every_steps=5) as monitor:
        for step in range(1, 13):
            monitor.step(_record(step))
    assert _steps(tmp_path) == [1, 5, 10, 12]
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 5, 10, 12]
    fields = set(read_metrics(tmp_path / "metrics.jsonl")[0])
    assert fields == {f.name for f in dataclasses.fields(StepRecord)} - {"gpu", "kind_losses"} | {"kind", "time"}


def test_a_stopped_run_records_the_step_that_it_stopped_at(tmp_path: Path) -> None:
    monitor = open_monitor(World(), tmp_path, total_steps=100, log_every_steps=10)
    for step in range(1, 14):
        monitor.step(_record(step))
    monitor.close()
    monitor.close()
    assert _steps(tmp_path) == [1, 10, 13]


def test_rates_are_means_over_time_since_the_last_record() -> None:
    """3 steps: 4 examples in 1 s, 4 in 1 s, 4 in 6 s, of which 3 s waited: 12 examples in 8 s, 3/8 of it waiting."""
    window = [
        _record(1, examples_per_second=4.0, answer_tokens_per_second=40.0, data_wait_fraction=0.0, seconds=1.0),
        _record(2, examples_per_second=4.0, answer_tokens_per_second=20.0, data_wait_fraction=0.0, seconds=1.0),
        _record(3, examples_per_second=4 / 6, answer_tokens_per_second=10.0, data_wait_fraction=0.5, seconds=6.0),
    ]
    mean = mean_rates(window)
    assert mean.examples_per_second == pytest.approx(12 / 8)
    assert mean.answer_tokens_per_second == pytest.approx((40 + 20 + 60) / 8)
    assert mean.data_wait_fraction == pytest.approx(3 / 8)
    changed = ("examples_per_second", "answer_tokens_per_second", "data_wait_fraction")
    assert dataclasses.replace(mean, **{name: getattr(window[-1], name) for name in changed}) == window[-1]


def test_the_window_is_emptied_by_a_record(tmp_path: Path) -> None:
    with open_monitor(World(), tmp_path, total_steps=4, log_every_steps=2) as monitor:
        for step, rate in ((1, 1000.0), (2, 2.0), (3, 4.0), (4, 8.0)):
            monitor.step(_record(step, examples_per_second=rate))
    rates = [r["examples_per_second"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [1000.0, 2.0, 6.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_monitor(World(1, 2), tmp_path, total_steps=2, log_every_steps=1, cuda_index=0) as monitor:
        monitor.step(_record(1))
        monitor.event("checkpoint", 1, {"seconds": 2.0})
    assert not isinstance(monitor, RunMonitor)
    assert list(tmp_path.iterdir()) == []


def test_events(tmp_path: Path) -> None:
    with open_monitor(World(), tmp_path, total_steps=4, log_every_steps=1) as monitor:
        monitor.step(_record(1))
        monitor.event("checkpoint", 1, {"seconds": 2.0, "path": "checkpoints/step-000001"})
        monitor.event("stopped", 1)
    step, saved, stopped = read_metrics(tmp_path / "metrics.jsonl")
    assert (saved["kind"], saved["name"], saved["seconds"]) == ("event", "checkpoint", 2.0)
    assert saved["path"] == "checkpoints/step-000001"
    assert stopped["name"] == "stopped"
    assert step["time"] <= saved["time"] <= stopped["time"]
    assert _scalars(tmp_path, "checkpoint/seconds") == [(1, 2.0)]


def test_resume_leaves_each_step_once(tmp_path: Path) -> None:
    """A run saved at 6, killed at 9 and resumed; its loss differs after, so that stale values would be seen."""
    first = open_monitor(World(), tmp_path, total_steps=12, log_every_steps=1)
    for step in range(1, 10):
        first.step(_record(step, loss=1.0))
        if step == 6:
            first.event("checkpoint", step)
    first.event("checkpoint", 9)
    first.close()
    with open_monitor(World(), tmp_path, total_steps=12, log_every_steps=1, resumed_step=6) as second:
        for step in range(7, 13):
            second.step(_record(step, loss=2.0))
    records = read_metrics(tmp_path / "metrics.jsonl")
    wanted = [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "step"] == wanted
    assert _steps(tmp_path, "event") == [6]
    assert _scalars(tmp_path, "train/loss") == wanted


def test_gpu_readings_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        def read(self) -> GpuReading:
            return GpuReading(10.0, 80.0, 55.0, None)

    monkeypatch.setattr("mellow_ds.monitor.monitor.open_gpu_meter", lambda index: Meter() if index == 3 else None)
    with open_monitor(World(), tmp_path, total_steps=2, log_every_steps=1, cuda_index=3) as monitor:
        monitor.step(_record(1))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["gpu_memory_used_gib"] == 10.0
    assert record["gpu_utilisation_percent"] == 55.0
    assert "gpu_power_watts" not in record
    assert _scalars(tmp_path, "train/gpu_memory_used_gib") == [(1, 10.0)]


def test_as_metrics_is_flat() -> None:
    metrics = as_metrics(_record(3, gpu=GpuReading(gpu_power_watts=300.0)))
    assert metrics["gpu_power_watts"] == 300.0
    assert all(isinstance(value, (int, float)) for value in metrics.values())
