"""Two step folders side by side: every kind of difference is seen, and nothing else."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mellow_ds.checkpoint.step_folder import FORMAT_VERSION
from mellow_ds.verify.step_files import compare_steps


def write(folder: Path, **changes: float) -> Path:
    """A step folder by hand: a trained weight, a frozen one, a buffer, moments, counters, a generator state."""
    folder.mkdir()
    value = {"weight": 1.0, "frozen": 2.0, "buffer": 3.0, "moment": 4.0, "updates": 5, "random": 6, **changes}
    model = {"a.w": torch.tensor([0.0, value["weight"]]), "b.w": torch.tensor([value["frozen"]])}
    save_file({**model, "b.mean": torch.tensor([value["buffer"]])}, folder / "model.safetensors")
    moments = {"a.w::exp_avg": torch.tensor([0.0, value["moment"]]), "a.w::num_updates": torch.tensor(value["updates"])}
    save_file(moments, folder / "optimizer.safetensors")
    save_file({"cpu": torch.tensor([value["random"]])}, folder / "random-00000.safetensors")
    state = {
        "format_version": FORMAT_VERSION, "world_size": value.get("world", 1), "metrics": {"loss": value.get("loss")},
        "progress": {"step": value.get("step", 3)}, "stream": {"step": value.get("position", 3)},
        "schedule": {"best": value.get("best", 1.5)}, "clip": {"mean": 0.5},
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_equal_folders_do_not_differ_whatever_the_start(tmp_path: Path) -> None:
    found = compare_steps(write(tmp_path / "a"), write(tmp_path / "b", world=2, loss=7.0))
    assert found.is_none


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight": 1.25}, {"weight": 0.25}),
        ({"weight": math.nan}, {"weight": math.inf}),
        ({"frozen": 2.5}, {"fixed_equal": False}),
        ({"buffer": 3.5}, {"fixed_equal": False}),
        ({"moment": 4.5}, {"moments_equal": False}),
        ({"updates": 6}, {"moments_equal": False}),
        ({"random": 7}, {"random_equal": False}),
        ({"step": 4}, {"position_equal": False, "state_equal": False}),
        ({"position": 4}, {"position_equal": False, "state_equal": False}),
        ({"best": 1.0}, {"state_equal": False}),
    ],
)
def test_each_difference_is_seen_for_what_it_is(tmp_path: Path, change: dict, expected: dict) -> None:
    found = compare_steps(write(tmp_path / "a"), write(tmp_path / "b", **change))
    same = {
        "weight": 0.0, "fixed_equal": True, "moments_equal": True, "position_equal": True, "state_equal": True,
        "random_equal": True,
    }  # fmt: skip
    assert vars(found) == {**same, **expected}
    assert not found.is_none


def test_a_missing_buffer_is_a_difference(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    save_file({"a.w": torch.tensor([0.0, 1.0]), "b.w": torch.tensor([2.0])}, other / "model.safetensors")
    assert not compare_steps(one, other).fixed_equal
