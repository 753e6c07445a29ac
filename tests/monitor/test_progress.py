"""What a person sees: a bar in a terminal, lines without one."""

import dataclasses
import logging

import pytest

from mellow_ds.monitor.progress import Progress, describe
from mellow_ds.monitor.record import GpuReading, StepRecord

RECORD = StepRecord(
    step=12,
    epoch=0.5,
    loss=1.23456,
    learning_rate=5e-4,
    grad_norm=0.789,
    examples_per_second=31.25,
    answer_tokens_per_second=200.0,
    data_wait_fraction=0.07,
    num_examples=8,
    seconds=0.25,
)


def test_description() -> None:
    assert describe(RECORD) == "loss 1.2346 lr 5.00e-04 norm 0.79 31.2 ex/s wait 7%"
    assert describe(dataclasses.replace(RECORD, num_bad_samples=3)).endswith("wait 7% bad samples 3")
    gpu = dataclasses.replace(RECORD, gpu=GpuReading(10.25, 80.0, 97.0, None))
    assert describe(gpu).endswith("wait 7% gpu 10.2 GiB 97%")


def test_lines_without_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("mellow_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "mellow_ds")
    progress = Progress(total_steps=20, in_terminal=False)
    progress.step(RECORD)
    assert not caplog.records
    progress.line(RECORD)
    progress.close()
    assert [r.getMessage() for r in caplog.records] == [f"step 12 of 20: {describe(RECORD)}"]


def test_bar_starts_where_the_run_goes_on(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mellow_ds"), "propagate", True)
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress(total_steps=20, resumed_step=11, in_terminal=True)
    progress.step(RECORD)
    progress.line(RECORD)
    progress.close()
    shown = capsys.readouterr().err
    assert "11/20" in shown
    assert "12/20" in shown
    assert "loss 1.2346" in shown
    assert not caplog.records
