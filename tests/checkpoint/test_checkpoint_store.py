"""Saving: published whole, beside training, kept as asked, loud when it fails; finding the newest whole step."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mellow_ds.checkpoint import store as store_module
from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.step_folder import read_state
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.errors import CheckpointError, SaveError
from mellow_ds.world import World
from tests.checkpoint.plain import STATE, PlainEngine
from tests.checkpoint.saving import save_step
from tests.ranks import run_ranks


def make_store(folder: Path, keep: int = 2, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, keep, Peers(World()), **options)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = make_store(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        save_step(store, step, PlainEngine(step), {"num_updates": step})
    return store


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_each_is_whole(store: CheckpointStore) -> None:
    assert [path.name for path in store.steps()] == ["step-000002", "step-000003"]
    newest = store.newest()
    assert newest is not None
    verify_checkpoint(newest)
    assert read_state(newest)["num_updates"] == 3
    files = ["files.json", "model.safetensors", "optimizer.safetensors", "random-00000.safetensors", "state.json"]
    assert names(newest) == files


def test_a_count_of_updates_stands_beside_the_moments(store: CheckpointStore) -> None:
    moments = load_file(store.folder_of(3) / "optimizer.safetensors")
    assert moments["w1::num_updates"].item() == 4
    assert moments["w1::num_updates"].dtype == torch.int64
    assert moments["w1::exp_avg@0"].tolist() == [4.25] * 6


def test_steps_beyond_six_digits_are_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-new").mkdir()
    (tmp_path / ".writing-step-000005").mkdir()
    assert [path.name for path in make_store(tmp_path).steps()] == ["step-000002", "step-999999", "step-1000000"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: flip(step / "model.safetensors"), "model.safetensors is damaged"),
        (lambda step: (step / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda step: (step / "random-00000.safetensors").write_bytes(b""), "has 0 bytes"),
        (lambda step: (step / "files.json").unlink(), "no readable files.json"),
        (lambda step: (step / "files.json").write_text("{"), "no readable files.json"),
        (lambda step: (step / "files.json").write_text("[1]"), "no readable files.json"),
        (lambda step: (step / "state.json").write_text("{}"), "state.json has 2 bytes"),
    ],
)
def test_damage_is_named_and_the_step_before_taken(
    store: CheckpointStore, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = store.steps()[-1]
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(newest)
    with caplog.at_level("WARNING", "mellow_ds"):
        assert store.newest() == store.folder_of(2)
    assert "trying the step before it" in caplog.text


def test_an_empty_or_missing_folder_has_no_newest(tmp_path: Path) -> None:
    assert make_store(tmp_path / "no").newest() is None


@pytest.mark.parametrize("latest", ["empty", "foreign", "dangling", "folder"])
def test_a_file_called_latest_does_not_matter(store: CheckpointStore, latest: str) -> None:
    path = store.folder_of(3).parent / "latest"
    if latest == "dangling":
        path.symlink_to("global_step99")
    elif latest == "folder":
        path.mkdir()
    else:
        path.write_text("" if latest == "empty" else "step-000002")
    assert store.newest() == store.folder_of(3)
    save_step(store, 4, PlainEngine(4), STATE)
    assert store.newest() == store.folder_of(4)


def test_saving_a_step_again_never_leaves_a_moment_without_it(store: CheckpointStore) -> None:
    """A resumed run passes a step that was saved before: whole, it stays; damaged, it is replaced."""
    newest = store.steps()[-1]
    before = (newest / "model.safetensors").stat().st_ino
    save_step(store, 3, PlainEngine(3), STATE)
    assert (newest / "model.safetensors").stat().st_ino == before
    flip(newest / "model.safetensors")
    save_step(store, 3, PlainEngine(3), STATE)
    verify_checkpoint(newest)
    assert names(newest.parent) == ["step-000002", "step-000003"]


def test_damaged_later_steps_do_not_push_out_new_ones(tmp_path: Path) -> None:
    """keep 1; step 6 is damaged and the run goes on from step 2: what it saves must stay."""
    store = make_store(tmp_path, keep=2)
    for step in (2, 6):
        save_step(store, step, PlainEngine(step), STATE)
    flip(store.folder_of(6) / "model.safetensors")
    again = make_store(tmp_path, keep=1)
    assert again.newest() == store.folder_of(2)
    save_step(again, 4, PlainEngine(4), STATE)
    assert [path.name for path in again.steps()] == ["step-000004", "step-000006"]
    assert again.newest() == store.folder_of(4)


def test_a_damaged_step_that_was_passed_counts_neither_among_the_newest_nor_as_the_best(tmp_path: Path) -> None:
    """It goes when those go that are older than the newest whole ones."""
    store = make_store(tmp_path, keep=9)
    for step, loss in ((2, 3.0), (5, 1.0)):
        save_step(store, step, PlainEngine(step), {**STATE, "metrics": {"loss": loss}})
    flip(store.folder_of(5) / "model.safetensors")
    again = make_store(tmp_path, keep=2, keep_best="loss")
    assert again.newest() == store.folder_of(2)
    kept = []
    for step, loss in ((4, 2.0), (6, 2.5), (8, 2.6)):
        save_step(again, step, PlainEngine(step), {**STATE, "metrics": {"loss": loss}})
        kept.append([int(path.name[5:]) for path in again.steps()])
    assert kept == [[2, 4, 5], [4, 5, 6], [4, 6, 8]]
    save_step(again, 5, PlainEngine(5), STATE)  # saved anew, it is whole
    verify_checkpoint(again.folder_of(5))


def test_where_every_step_is_damaged_they_are_listed_and_nothing_is_begun(store: CheckpointStore) -> None:
    """Case 22: a run that started from nothing over them would look like one that goes on."""
    flip(store.folder_of(3) / "model.safetensors")
    (store.folder_of(2) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest()
    line = str(caught.value)
    assert line.startswith(f"{store.folder_of(3).parent} has no step that is whole: ")
    assert "step-000003/model.safetensors is damaged" in line
    assert "step-000002/state.json is missing" in line
    assert "another save_dir" in line
    assert "\n" not in line


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_failed_save_says_why_and_keeps_what_was_there(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, "as the system says")

    monkeypatch.setattr(store_module, "write_part", fails)
    with pytest.raises(SaveError, match=rf"step-000004 was not saved: .*{reason}.*it takes .*free; step-000003 stays"):
        save_step(store, 4, PlainEngine(4), STATE)
    assert names(store.folder_of(4).parent) == ["step-000002", "step-000003"]
    monkeypatch.undo()
    assert save_step(store, 5, PlainEngine(5), STATE) == store.newest()  # the next one is tried as if nothing had been


def test_an_error_of_any_kind_in_the_background_is_told(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "write_part", lambda *_: 1 / 0)
    with pytest.raises(SaveError, match="ZeroDivisionError"):
        save_step(store, 4, PlainEngine(4), STATE)


def test_what_an_interrupted_save_left_is_no_step_and_is_replaced(store: CheckpointStore) -> None:
    parent = store.folder_of(4).parent
    for name in (".writing-step-000004", ".writing-step-000003", ".writing-step-000099", ".removing-step-000001"):
        (parent / name).mkdir()
        (parent / name / "model.safetensors").write_bytes(b"half")
    assert store.newest() == store.folder_of(3)
    save_step(store, 4, PlainEngine(4), STATE)
    assert store.newest() == store.folder_of(4)
    assert names(parent) == ["step-000003", "step-000004"]


def test_a_state_of_another_format_is_refused(store: CheckpointStore) -> None:
    path = store.folder_of(3) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(CheckpointError, match="format version 7"):
        read_state(store.folder_of(3))
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="format version None"):
        read_state(store.folder_of(3))


def test_describe_is_asked_once_and_written_into_every_step(tmp_path: Path) -> None:
    calls = []

    def describe(folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    store = make_store(tmp_path, describe=describe)
    for step in (1, 2):
        folder = save_step(store, step, PlainEngine(step), STATE)
        assert (folder / "config.json").read_text() == "{}"
        assert "config.json" in json.loads((folder / "files.json").read_text())
    assert len(calls) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Exception("os error 28")])
def test_a_description_that_cannot_be_written_is_a_save_that_failed(tmp_path: Path, error: Exception) -> None:
    """And not the end of the run; the next save asks for it again."""
    errors = [error]

    def describe(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        if errors:
            raise errors.pop()

    store = make_store(tmp_path, describe=describe)
    with pytest.raises(SaveError, match="step-000001 was not saved"):
        save_step(store, 1, PlainEngine(1), STATE)
    assert names(tmp_path) == []
    assert "config.json" in names(save_step(store, 2, PlainEngine(2), STATE))


def test_a_save_needs_no_other_disk_than_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    store = make_store(tmp_path / "run", describe=lambda folder: (folder / "config.json").write_text("{}"))
    saved = save_step(store, 1, PlainEngine(1), STATE)
    files = ["config.json", "files.json", "model.safetensors", "optimizer.safetensors", "random-00000.safetensors"]
    assert names(saved) == [*files, "state.json"]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1, keep_best="eval_loss")
    for step, value in enumerate((3.0, 1.0, None, 2.0, float("nan")), start=1):
        save_step(store, step, PlainEngine(step), {**STATE, "metrics": {"eval_loss": value, "loss": -step}})
    assert [path.name for path in store.steps()] == ["step-000002", "step-000005"]
    save_step(store, 6, PlainEngine(6), {**STATE, "metrics": {"eval_loss": 0.5}})
    assert [path.name for path in store.steps()] == ["step-000006"]
    save_step(store, 7, PlainEngine(7), {"num_updates": 3})  # a step without metrics
    assert [path.name for path in store.steps()] == ["step-000006", "step-000007"]


def test_training_goes_on_while_a_step_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed after `begin` is not in the step; it is published only once the ranks have agreed twice."""
    may_write = threading.Event()
    original = store_module.write_part

    def slow(*arguments: Any) -> None:
        may_write.wait(20)
        original(*arguments)

    monkeypatch.setattr(store_module, "write_part", slow)
    store, engine = make_store(tmp_path), PlainEngine(1)
    assert store.begin(1, engine, STATE) is None
    engine.value = 50
    assert store.vote() == (0, 0)
    assert store.settle(*store.vote()) is None
    assert store.newest() is None
    may_write.set()
    outcomes = []
    for _ in range(2):  # written, published
        assert store._pending is not None
        assert store._pending.task is not None
        store._pending.task.wait()
        outcomes.append(store.settle(*store.vote()))
    assert outcomes[0] is None
    assert outcomes[1] is not None
    assert (outcomes[1].step, outcomes[1].error) == (1, "")
    assert outcomes[1].num_bytes == 3 * 22 * 4 + 3 * 8 + 4 * 4 + 8
    assert float(load_file(tmp_path / "step-000001" / "model.safetensors")["w0"][0, 0]) == 1
    assert store.wait() is None


def test_all_is_on_the_disk_before_a_step_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and the folder itself are flushed before the rename, the folder around them after it."""
    done: list[tuple[str, str]] = []
    flush, rename = os.fsync, Path.rename

    def noting_flush(descriptor: int) -> None:
        done.append(("flush", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        flush(descriptor)

    def noting_rename(path: Path, target: Path) -> Path:
        done.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting_flush)
    monkeypatch.setattr(Path, "rename", noting_rename)
    saved = save_step(make_store(tmp_path), 1, PlainEngine(1), STATE)
    named = done.index(("rename", str(saved)))
    aside = tmp_path / ".writing-step-000001"
    before = [path for what, path in done[:named] if what == "flush"]
    assert {str(aside / name) for name in names(saved)} < set(before)
    assert before[-1] == str(aside)  # with all names in it
    assert done[named + 1 :] == [("flush", str(tmp_path))]


def test_a_step_that_was_written_but_not_published_is_published_at_the_next_start(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.begin(1, PlainEngine(1), STATE)
    store.leave()  # the run dies here
    assert names(tmp_path) == [".writing-step-000001"]
    again = make_store(tmp_path)
    assert again.newest() == tmp_path / "step-000001"
    assert names(tmp_path) == ["step-000001"]
    assert "part-00000.json" not in names(tmp_path / "step-000001")


def two_ranks(world: World, folder: Path) -> None:
    peers = Peers(world)
    store = CheckpointStore(folder, 2, peers)
    saved = save_step(store, 1, PlainEngine(1, sizes=(40, 12, 12, 12)), STATE)
    assert store.newest() == saved
    assert names(saved) == [
        "files.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
        "optimizer.safetensors.index.json", "random-00000.safetensors", "random-00001.safetensors", "state.json",
    ]  # fmt: skip
    # w0 has more bytes than all the rest: it goes to one rank, with its moments, the rest to the other
    weights = [load_file(saved / f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    assert [sorted(w) for w in weights] == [["w0"], ["buffer", "frozen", "w1", "w2", "w3"]]
    assert "w0::exp_avg@0" in load_file(saved / "optimizer-00001-of-00002.safetensors")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in weights for t in part.values())
    assert index["weight_map"]["w3"] == "model-00002-of-00002.safetensors"
    # one flipped bit in the file that rank 1 hashes, and both pass the step over
    save_step(store, 2, PlainEngine(2), STATE)
    peers.all_ok(True)
    if world.is_main:
        flip(folder / "step-000002" / "random-00001.safetensors")
    peers.all_ok(True)
    assert store.newest() == saved
    # all moments are rank 0's, but rank 1 has weights to write
    saved = save_step(store, 2, PlainEngine(1, sizes=(64,)), STATE)
    assert [name for name in names(saved) if name.startswith("optimizer")] == ["optimizer.safetensors"]
    assert [name for name in names(saved) if name.startswith("model-")] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert store.newest() == saved  # it was damaged, and is replaced
    # a failure of rank 1 alone: both say so in the same words
    store_module.write_part = _failing(world)  # type: ignore[assignment]
    with pytest.raises(SaveError, match=r"step-000003 was not saved: rank 1: the disk is full.*step-000002 stays"):
        save_step(store, 3, PlainEngine(3), STATE)
    peers.all_ok(True)
    assert names(folder) == ["step-000001", "step-000002"]


def _failing(world: World) -> Callable[..., None]:
    original = store_module.write_part

    def write(*arguments: Any) -> None:
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    return write


def test_two_ranks_share_writing_and_reading(tmp_path: Path) -> None:
    run_ranks(2, two_ranks, tmp_path)
