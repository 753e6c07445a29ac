"""metrics.jsonl through kills, resumes and values that JSON lacks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mellow_ds.errors import FaultError
from mellow_ds.monitor.metrics import MetricsFile, read_metrics


def _write(path: Path, steps: range, resumed_step: int = 0) -> None:
    file = MetricsFile(path, resumed_step)
    for step in steps:
        file.write("step", step, {"loss": step / 2})
    file.close()


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    before = time.time()
    file.write("step", 1, {"loss": 2.5, "epoch": 0.1})
    (record,) = read_metrics(path)
    assert abs(record.pop("time") - before) < 10
    assert record == {"kind": "step", "step": 1, "loss": 2.5, "epoch": 0.1}
    file.close()


def test_resuming_drops_what_was_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    _write(path, range(5, 11), resumed_step=4)
    assert _steps(path) == list(range(1, 11))
    _write(path, range(1, 3), resumed_step=0)
    assert _steps(path) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_is_rewritten_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    inode, content = path.stat().st_ino, path.read_bytes()
    MetricsFile(path, resumed_step=7).close()
    assert (path.stat().st_ino, path.read_bytes()) == (inode, content)


def test_a_torn_end_is_mended_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole) + 1):
        path.write_bytes(whole[:end])
        assert [r["step"] for r in read_metrics(path)] in ([1, 2], [1, 2, 3])
        _write(path, range(4, 5), resumed_step=3)
        assert _steps(path) in ([1, 2, 4], [1, 2, 3, 4]), end


def test_a_killed_writer(tmp_path: Path) -> None:
    """A process that writes without end is killed; what it wrote is whole or mended, and no step stands twice."""
    path = tmp_path / "metrics.jsonl"
    source = (
        "import sys, itertools\nfrom pathlib import Path\nfrom mellow_ds.monitor.metrics import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n    file.write('step', step, {'text': 'x' * 5000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source, str(path)])
    try:
        deadline = time.monotonic() + 30
        while not (path.exists() and path.stat().st_size > 500_000) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    written = [record["step"] for record in read_metrics(path)]
    assert written == list(range(1, len(written) + 1))
    assert len(written) >= 90
    _write(path, range(51, 53), resumed_step=50)
    assert _steps(path) == list(range(1, 53))


def test_lines_that_are_no_records_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n\x00\xff\n[1]\n{"kind": "step"}\n\n{"kind": "step", "step": 2}\n')
    _write(path, range(3, 4), resumed_step=2)
    assert _steps(path) == [1, 2, 3]


def test_values_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write("step", 1, {"loss": float("nan"), "norm": float("inf"), "parts": [1.0, {"a": float("-inf")}], "n": 3})
    file.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["loss"] is record["norm"] is None
    assert record["parts"] == [1.0, {"a": None}]
    assert record["n"] == 3


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FaultError, match=r"metrics\.jsonl cannot be opened"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile.__new__(MetricsFile)
    file._path, file._file = path, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(FaultError, match="No space left"):
        file.write("step", 1, {})
    file.close()
