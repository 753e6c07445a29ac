"""What a run says, where nobody takes it: the launcher goes on, and counts what is lost."""

import os
import time
from pathlib import Path

import pytest

from mellow_ds.launcher import output as output_module
from mellow_ds.launcher.hostfile import Host
from mellow_ds.launcher.output import Output
from mellow_ds.launcher.plan import LaunchPlan, place_ranks


def test_a_log_that_takes_no_lines_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a file system that hangs; here a pipe that is full."""
    monkeypatch.setattr(output_module, "_CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(output_module, "_MAX_WAITING_LINES", 50)
    os.mkfifo(tmp_path / "rank-0.log")
    pipe = os.open(tmp_path / "rank-0.log", os.O_RDWR | os.O_NONBLOCK)
    output = Output(tmp_path)
    output.begin(LaunchPlan(hosts=place_ranks([Host("a", (0,))]), command=("x",), folder="/"))
    began = time.monotonic()
    for number in range(3000):
        output.rank_line(0, 1, f"{number} {'x' * 100}")
    assert time.monotonic() - began < 20  # for ever, as long as one waits for the file
    assert list(output.last_lines[0])[-1].startswith("2999 ")
    while not output._printer.is_empty:  # or the note would find no place either
        time.sleep(0.01)
    output.close()
    assert "lines are not in the log files" in capfd.readouterr().err
    while b"2 x" not in os.read(pipe, 65536):  # what came before is there
        pass
    os.close(pipe)
