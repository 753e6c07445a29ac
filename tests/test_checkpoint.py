"""Step folders: published whole, newest valid one found, damage noticed, old ones removed."""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mellow_ds import checkpoint
from mellow_ds.checkpoint import CheckpointStore, read_state, verify_checkpoint
from mellow_ds.engine.protocol import ParameterState
from mellow_ds.errors import CheckpointError
from mellow_ds.world import World


class OneWeight:
    """An engine with one trained weight, one frozen and one buffer."""

    def __init__(self, value: float) -> None:
        self.value = value

    def parameter_states(self) -> Iterator[ParameterState]:
        weight = torch.full((2, 3), self.value)
        yield ParameterState("w", weight, {"exp_avg": weight + 1, "exp_avg_sq": weight + 2})

    def fixed_state(self) -> dict[str, torch.Tensor]:
        return {"frozen": torch.ones(4), "buffer": torch.zeros(1)}


def make_store(folder: Path, keep: int = 2, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, keep, World(), lambda ok: ok, **options)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = make_store(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        store.save(step, OneWeight(step), {"num_updates": step})  # type: ignore[arg-type]
    return store


def test_the_newest_are_kept_and_each_is_whole(store: CheckpointStore) -> None:
    assert [path.name for path in store.steps()] == ["step-000002", "step-000003"]
    newest = store.newest()
    assert newest is not None
    verify_checkpoint(newest)
    assert read_state(newest)["num_updates"] == 3
    names = {path.name for path in newest.iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "random-00000.safetensors",
        "state.json",
        "files.json",
    }


def test_steps_beyond_six_digits_are_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-new").mkdir()
    (tmp_path / ".writing-step-000005").mkdir()
    assert [path.name for path in make_store(tmp_path).steps()] == ["step-000002", "step-999999", "step-1000000"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: flip(step / "model.safetensors"), "model.safetensors is damaged"),
        (lambda step: (step / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda step: (step / "random-00000.safetensors").write_bytes(b""), "has 0 bytes"),
        (lambda step: (step / "files.json").unlink(), "no readable files.json"),
        (lambda step: (step / "files.json").write_text("{"), "no readable files.json"),
        (lambda step: (step / "state.json").write_text("{}"), "state.json has 2 bytes"),
    ],
)
def test_damage_is_named_and_the_step_before_taken(
    store: CheckpointStore, damage: Callable[[Path], object], message: str
) -> None:
    newest = store.steps()[-1]
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(newest)
    found = store.newest()
    assert found is not None
    assert found.name == "step-000002"


def test_an_empty_or_missing_folder_has_no_newest(tmp_path: Path) -> None:
    assert make_store(tmp_path / "no").newest() is None


def test_saving_a_step_again_never_leaves_a_moment_without_it(store: CheckpointStore) -> None:
    """A resumed run passes a step that was saved before: whole, it stays; damaged, it is replaced."""
    newest = store.steps()[-1]
    before = (newest / "model.safetensors").stat().st_ino
    store.save(3, OneWeight(3), {"num_updates": 3})  # type: ignore[arg-type]
    assert (newest / "model.safetensors").stat().st_ino == before
    flip(newest / "model.safetensors")
    store.save(3, OneWeight(3), {"num_updates": 3})  # type: ignore[arg-type]
    verify_checkpoint(newest)


def test_a_failed_save_says_why_and_keeps_what_was_there(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000004 was not saved: the disk is full .* step-000003 stays"):
        store.save(4, OneWeight(4), {"num_updates": 4})  # type: ignore[arg-type]
    folder = store.folder_of(4).parent
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]


def test_what_an_interrupted_save_left_is_no_step_and_is_replaced(store: CheckpointStore) -> None:
    aside = store.folder_of(4).parent / ".writing-step-000004"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    assert store.newest() == store.folder_of(3)
    store.save(4, OneWeight(4), {"num_updates": 4})  # type: ignore[arg-type]
    assert store.newest() == store.folder_of(4)
    assert not aside.exists()


def test_a_state_of_another_format_is_refused(store: CheckpointStore) -> None:
    path = store.folder_of(3) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(CheckpointError, match="format version 7"):
        read_state(store.folder_of(3))


def test_describe_writes_into_the_step(tmp_path: Path) -> None:
    store = make_store(tmp_path, describe=lambda folder: (folder / "config.json").write_text("{}"))
    step = store.save(1, OneWeight(1), {"num_updates": 1})  # type: ignore[arg-type]
    assert "config.json" in json.loads((step / "files.json").read_text())
