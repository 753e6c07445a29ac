"""Event files read back with TensorBoard's own reader."""

import subprocess
import sys
from pathlib import Path

from mellow_ds.monitor.tensorboard import TensorBoard


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_scalars_are_read_back(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path)
    for step in range(1, 4):
        writer.scalars("train", step, {"loss": 1 / 2**step, "num_examples": 4, "note": "text", "flag": True})
    writer.scalars("evaluation", 3, {"digit-open": 0.5})
    writer.text("about", 0, "a run")
    writer.close()
    assert _read(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.25), (3, 0.125)],
        "train/num_examples": [(1, 4.0), (2, 4.0), (3, 4.0)],
        "evaluation/digit-open": [(3, 0.5)],
    }


def test_resuming_voids_later_steps(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    for step in range(1, 8):
        first.scalars("train", step, {"loss": 1.0})
    first.close()
    second = TensorBoard(tmp_path, resumed_step=4)
    for step in range(5, 7):
        second.scalars("train", step, {"loss": 2.0})
    second.close()
    wanted = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    assert _read(tmp_path) == {"train/loss": wanted}


def test_importing_the_monitor_imports_no_torch() -> None:
    source = "import sys, mellow_ds.monitor.monitor; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
